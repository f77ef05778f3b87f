"""Bytes that are not UTF-8 text: what they probably are, as the end of a sentence for the user."""

from __future__ import annotations

from pathlib import Path

BYTE_ORDER_MARK = "\ufeff"
FIRST_BYTES = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"(\xb5/\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"%PDF": "PDF",
}
"""File formats other than UTF-8 text, by their first bytes."""
MANY_NULS = "begins a run of many NUL bytes, as in UTF-16 and binary files: convert the file to UTF-8."


def has_many_nuls(text: bytes) -> bool:
    """Return whether `text` is probably UTF-16 without a byte order mark, or not text, although it decodes as UTF-8."""
    return 4 * text.count(0) > len(text)


def not_utf8(path: str | Path) -> str:
    """Return the end of a sentence about a file that is not UTF-8: its likely format, by its first bytes, and the remedy."""
    with open(path, "rb") as file:
        begin = file.read(8)
    kind = next((name for first, name in FIRST_BYTES.items() if begin.startswith(first)), None)
    if kind is None:
        return "is not UTF-8: convert the file to UTF-8."
    if kind == "UTF-16":
        return "is not UTF-8 but UTF-16, as its byte order mark says: convert the file to UTF-8."
    return (
        f"is not UTF-8, and the file's first bytes say that it is {kind}: give it the matching suffix, or convert it to "
        "UTF-8 text."
    )
