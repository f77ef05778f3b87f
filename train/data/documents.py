"""The documents of a part, one string each; an error names the file and the line or row."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from train.data.encoding import BYTE_ORDER_MARK, MANY_NULS, has_many_nuls, not_utf8
from train.data.fields import MISSING, checked_text, field_names, field_of, named
from train.data.parts import Part, explained, text_cuts
from train.data.skipped import Skipped, leave_out
from train.data.tables import read_csv, read_parquet

DOCUMENT_BYTES = 16 << 10
# The parsed numbers are never used, and float accepts any length, but int() refuses more than 4,300 digits.
_JSON = json.JSONDecoder(parse_int=float)


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
    readers = {".txt": _read_text, ".csv": read_csv, ".parquet": read_parquet}
    documents = (text for text in readers.get(part.kind, _read_jsonl)(part, text_field, skipped) if text)
    return islice(documents if skipped is None else _readable(documents, skipped), part.max_documents)


def _readable(documents: Iterator[str], skipped: Skipped) -> Iterator[str]:
    try:
        yield from documents
    except ValueError as error:
        skipped.add(str(error))


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
        found = named(record)
        if isinstance(record, dict):
            found = f"the fields {field_names(record)}" if record else "an empty object"
        raise ValueError(f"has no field {text_field}, only {found}: {remedy}.")
    return checked_text(value, text_field)


def _read_text(part: Part, _: str, skipped: Skipped | None) -> Iterator[str]:
    with explained(part.path), open(part.path, "rb") as file:
        file.seek(part.start)
        data = file.read(part.stop - part.start)
    start = 0
    for stop in text_cuts(data, DOCUMENT_BYTES):
        piece = data[start:stop]
        text, problem, wrong = "", "", 0
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            problem, wrong = not_utf8(part.path), error.start
        else:
            problem = MANY_NULS if has_many_nuls(piece) else ""
        if problem:
            line = _lines_before(part) + data.count(b"\n", 0, start + wrong) + 1
            leave_out(f"{part.path}, line {line} {problem}", skipped)
            text = ""
        yield text.removeprefix(BYTE_ORDER_MARK) if part.start + start == 0 else text
        start = stop


def _read_jsonl(part: Part, text_field: str, skipped: Skipped | None) -> Iterator[str]:
    for number, line in enumerate(_lines(part), 1):
        if not line.isspace():
            try:
                text = text_of(line, text_field)
            except ValueError as error:
                place = f"{part.path}, line {_lines_before(part) + number}"
                is_plain = str(error).startswith("is not UTF-8") and part.kind == ".jsonl"
                leave_out(f"{place} {not_utf8(part.path) if is_plain else error}", skipped)
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


def _lines_before(part: Part) -> int:
    """Count the lines of the file before the part; called only to locate an error."""
    if part.start == 0:
        return 0
    with open(part.path, "rb") as file:
        return sum(file.read(min(1 << 20, part.start - at)).count(b"\n") for at in range(0, part.start, 1 << 20))
