"""The documents of a part, one string each; an error names the file and the line or row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timedelta
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import Any

from train.data.parts import Part, explained, text_cuts

DOCUMENT_BYTES = 16 << 10
BYTE_ORDER_MARK = "\ufeff"
MOST_FIELDS_NAMED = 8
MOST_PLACES = 5
"""The number of skipped documents of each part whose errors are kept."""
MISSING = object()
"""The mark of a missing value, because None can be a value."""
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
# The parsed numbers are never used, and float accepts any length, but int() refuses more than 4,300 digits.
_JSON = json.JSONDecoder(parse_int=float)


@dataclass
class Skipped:
    """Documents that could not be read and were skipped."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """The errors of the first few, each with its place."""

    def add(self, words: str) -> None:
        """Count a document; keep the words about it if it is one of the first."""
        self.count += 1
        if len(self.first) < MOST_PLACES:
            self.first.append(words)


def read_documents(part: Part, text_field: str, skipped: Skipped | None = None) -> Iterator[str]:
    """Yield the part's documents in order, without empty ones.

    A text file is cut at blank lines into documents of 16 to 32 KiB; together they are the whole file. A byte order mark
    at the start of a file is not part of the text.

    Args:
        part: The part to read.
        text_field: The field that holds a document's text, or a path of fields separated by dots.
        skipped: Collects the errors of documents that cannot be read and are skipped. After an error that does not
            belong to a single document, the rest of the part is skipped. If None, the first error is raised.

    Raises:
        ValueError: A document cannot be read; the message names its place.
    """
    readers = {".txt": _read_text, ".csv": _read_csv, ".parquet": _read_parquet}
    documents = (text for text in readers.get(part.kind, _read_jsonl)(part, text_field, skipped) if text)
    return islice(documents if skipped is None else _readable(documents, skipped), part.max_documents)


def _readable(documents: Iterator[str], skipped: Skipped) -> Iterator[str]:
    try:
        yield from documents
    except ValueError as error:
        skipped.add(str(error))


def _leave_out(words: str, skipped: Skipped | None) -> None:
    """Raise, or record a document that is skipped."""
    if skipped is None:
        raise ValueError(words) from None
    skipped.add(words)


def limit_parts(parts: list[Part], text_field: str, max_documents: int, skips_errors: bool = False) -> list[Part]:
    """Return the parts that hold the first documents; these are read once to count them.

    Args:
        parts: All parts, in order.
        text_field: The field that holds a document's text.
        max_documents: The number of documents to keep.
        skips_errors: Whether documents that cannot be read are skipped, and so not counted.
    """
    limited = []
    for part in parts:
        count = sum(
            1 for _ in islice(read_documents(part, text_field, Skipped() if skips_errors else None), max_documents)
        )
        limited.append(replace(part, max_documents=count))
        max_documents -= count
        if max_documents == 0:
            break
    return limited


def text_of(line: bytes, text_field: str) -> str:
    """Return the text in a line of JSON.

    Raises:
        ValueError: There is no text. The caller puts the line's place before the message.
    """
    remedy = f"give one JSON object per line with a string in data.text_field={text_field}"
    try:
        record = _JSON.decode(line.decode().removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8: convert the file to UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON ({error.msg.removesuffix(' at')}, character {error.pos + 1} of it): {remedy}."
        ) from None
    except RecursionError:
        raise ValueError(f"is nested too deeply to be read: {remedy}.") from None
    value = field_of(record, text_field)
    if value is MISSING:
        found = _named(record)
        if isinstance(record, dict):
            found = f"the fields {field_names(record)}" if record else "an empty object"
        raise ValueError(f"has no field {text_field}, only {found}: {remedy}.")
    return checked_text(value, text_field)


def field_of(record: Any, text_field: str) -> Any:
    """Return the value of a field, or of a path of fields such as meta.text; MISSING if there is none."""
    if isinstance(record, dict) and text_field in record:
        return record[text_field]
    for name in text_field.split("."):
        if not isinstance(record, dict) or name not in record:
            return MISSING
        record = record[name]
    return record


def field_names(names: Collection[str]) -> str:
    """Return the first field names of a record or table, formatted for a sentence."""
    shown = [_short(name) for name in islice(names, MOST_FIELDS_NAMED)]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more}" if names else "none"


def _short(name: str) -> str:
    """Make a name from a user's file printable and short enough for a sentence."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable if len(printable) <= 40 else f"{printable[:40]}..."


def checked_text(value: Any, text_field: str) -> str:
    """Return a value of the text field as text.

    Some programs store text in parquet files as plain bytes; these are decoded.

    Raises:
        ValueError: The value is not text. The caller puts the document's place before the message.
    """
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise ValueError(f"has {_named(value)} as {text_field}: give a string in data.text_field={text_field}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a surrogate pair in {text_field}, which UTF-8 cannot encode: fix it.") from None
    return value


def _named(value: Any) -> str:
    """Return the kind of a JSON or parquet value, with its article."""
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {
        type(None): "null", Number: "a number", str: "a string", list: "a list", dict: "an object", datetime: "a time",
        date: "a date", time: "a time of day", timedelta: "a span of time", tuple: "a list",
    }  # fmt: skip
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"{type(value).__name__} data")


def _read_text(part: Part, _: str, skipped: Skipped | None) -> Iterator[str]:
    with explained(part.path), open(part.path, "rb") as file:
        file.seek(part.start)
        data = file.read(part.stop - part.start)
    start = 0
    for stop in text_cuts(data, DOCUMENT_BYTES):
        piece = data[start:stop]
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            line = _lines_before(part) + data.count(b"\n", 0, start + error.start) + 1
            _leave_out(f"{part.path}, line {line} {not_utf8(part.path)}", skipped)
            text = ""
        if has_many_nuls(piece):
            line = _lines_before(part) + data.count(b"\n", 0, start) + 1
            _leave_out(f"{part.path}, line {line} {MANY_NULS}", skipped)
            text = ""
        yield text.removeprefix(BYTE_ORDER_MARK) if part.start + start == 0 else text
        start = stop


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


def _read_jsonl(part: Part, text_field: str, skipped: Skipped | None) -> Iterator[str]:
    for number, line in enumerate(_lines(part), 1):
        if not line.isspace():
            try:
                text = text_of(line, text_field)
            except ValueError as error:
                place = f"{part.path}, line {_lines_before(part) + number}"
                is_plain = str(error).startswith("is not UTF-8") and part.kind == ".jsonl"
                _leave_out(f"{place} {not_utf8(part.path) if is_plain else error}", skipped)
            else:
                yield text


def _lines(part: Part) -> Iterator[bytes]:
    if part.kind.endswith((".zst", ".zstd")):
        yield from _zstd_lines(part)
        return
    if part.kind.endswith(".gz"):
        with explained(part.path), open(part.path, "rb") as raw, gzip.open(raw) as file:
            try:
                yield from file
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{part.path} is not a complete gzip file ({error}): compress it again.") from None
        return
    with explained(part.path), open(part.path, "rb") as plain:
        plain.seek(part.start)
        position = part.start
        while position < part.stop and (line := plain.readline()):
            position += len(line)
            yield line


def _zstd_lines(part: Part) -> Iterator[bytes]:
    import pyarrow as pa

    with explained(part.path), open(part.path, "rb") as raw:
        try:
            with pa.CompressedInputStream(raw, "zstd") as file:
                yield from io.BufferedReader(file, 1 << 20)
        except OSError as error:
            if error.errno is not None:
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{part.path} is not a complete zstd file ({reason}): compress it again.") from None


def _read_csv(part: Part, text_field: str, skipped: Skipped | None) -> Iterator[str]:
    with explained(part.path), open(part.path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, [])
            if text_field not in names:
                raise ValueError(
                    f"{part.path} has no column {text_field} in its first line, only {field_names(names)}: name the "
                    "column with the text in data.text_field."
                )
            column = names.index(text_field)
            for row in rows:
                if len(row) > column:
                    yield row[column]
                elif row:
                    place = f"{part.path}, line {rows.line_num}"
                    _leave_out(f"{place} has {len(row)} columns, so none for {text_field}: fix it.", skipped)
        except csv.Error as error:
            raise ValueError(f"{part.path}, line {rows.line_num} is not CSV ({error}): fix it.") from None
        except UnicodeDecodeError:
            raise ValueError(f"{part.path}, after line {rows.line_num} {not_utf8(part.path)}") from None


def _lines_before(part: Part) -> int:
    """Count the lines of the file before the part; called only to locate an error."""
    if part.start == 0:
        return 0
    with open(part.path, "rb") as file:
        return sum(file.read(min(1 << 20, part.start - at)).count(b"\n") for at in range(0, part.start, 1 << 20))


def _read_parquet(part: Part, text_field: str, skipped: Skipped | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with explained(part.path), pq.ParquetFile(part.path) as file:
            names = file.schema_arrow.names
            column = text_field if text_field in names else text_field.partition(".")[0]
            if column not in names:
                raise ValueError(
                    f"{part.path} has no column {text_field}, only {field_names(names)}: name the column with the text in "
                    "data.text_field."
                )
            row = -1 + sum(file.metadata.row_group(index).num_rows for index in range(part.start))
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    try:
                        yield checked_text(_found({column: value.as_py()}, text_field), text_field)
                    except UnicodeDecodeError:
                        _leave_out(f"{part.path}, row {row} is not UTF-8: write it again as UTF-8.", skipped)
                    except ValueError as error:
                        _leave_out(f"{part.path}, row {row} {error}", skipped)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{part.path} is not a readable parquet file ({reason}): write it again.") from None


def _found(row: dict[str, Any], text_field: str) -> Any:
    value = field_of(row, text_field)
    if value is MISSING:
        raise ValueError(f"has nothing at {text_field}: give the path of a string in data.text_field.")
    return value
