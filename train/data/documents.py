"""Documents of a part, one string each; an error names the file and the line or row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from train.data.parts import Part, explained, text_cuts

DOCUMENT_BYTES = 16 << 10


def read_documents(part: Part, text_field: str) -> Iterator[str]:
    """The part's documents in order; empty ones are passed over.

    A text file is cut at blank lines into documents of 16 to 32 KiB that together are the file.
    """
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}
    documents = (text for text in readers[part.kind](part, text_field) if text)
    return islice(documents, part.max_documents)


def limit_parts(parts: list[Part], text_field: str, max_documents: int) -> list[Part]:
    """The parts that hold the first `max_documents` documents; those are read once to be counted."""
    limited = []
    for part in parts:
        count = sum(1 for _ in islice(read_documents(part, text_field), max_documents))
        limited.append(replace(part, max_documents=count))
        max_documents -= count
        if max_documents == 0:
            break
    return limited


def text_of(line: bytes, text_field: str) -> str:
    """The text in a line of JSON, or a `ValueError` that says what the line is instead, to be put behind its place."""
    remedy = f"give one JSON object a line with a string in data.text_field={text_field}"
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8: convert the file to UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}): {remedy}.") from None
    if not isinstance(record, dict) or text_field not in record:
        fields = f"the fields {', '.join(record)}" if isinstance(record, dict) else _named(record)
        raise ValueError(f"has no field {text_field} but {fields}: {remedy}.")
    return _checked(record[text_field], text_field)


def _checked(value: Any, text_field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has {_named(value)} as {text_field}: give a string in data.text_field={text_field}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a surrogate pair in {text_field}, which UTF-8 cannot write: mend it.") from None
    return value


def _named(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {type(None): "null", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _read_text(part: Part, _: str) -> Iterator[str]:
    with explained(part.path), open(part.path, "rb") as file:
        file.seek(part.start)
        data = file.read(part.stop - part.start)
    start = 0
    for stop in text_cuts(data, DOCUMENT_BYTES):
        try:
            text = data[start:stop].decode()
        except UnicodeDecodeError as error:
            line = _lines_before(part) + data.count(b"\n", 0, start + error.start) + 1
            raise ValueError(f"{part.path}, line {line} is not UTF-8: convert the file to UTF-8.") from None
        yield text
        start = stop


def _read_jsonl(part: Part, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(part), 1):
        if not line.isspace():
            try:
                text = text_of(line, text_field)
            except ValueError as error:
                raise ValueError(f"{part.path}, line {_lines_before(part) + number} {error}") from None
            yield text


def _lines(part: Part) -> Iterator[bytes]:
    if part.kind == ".jsonl.gz":
        with explained(part.path), open(part.path, "rb") as raw, gzip.open(raw) as file:
            try:
                yield from file
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{part.path} is not a whole gzip file ({error}): compress it anew.") from None
        return
    with explained(part.path), open(part.path, "rb") as plain:
        plain.seek(part.start)
        position = part.start
        while position < part.stop and (line := plain.readline()):
            position += len(line)
            yield line


def _lines_before(part: Part) -> int:
    """Lines of the file in front of the part; read only when an error is to be placed."""
    if part.start == 0:
        return 0
    with open(part.path, "rb") as file:
        return sum(file.read(min(1 << 20, part.start - at)).count(b"\n") for at in range(0, part.start, 1 << 20))


def _read_parquet(part: Part, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with explained(part.path), pq.ParquetFile(part.path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise ValueError(
                    f"{part.path} has no column {text_field} but {', '.join(names)}: name its text in data.text_field."
                )
            row = -1 + sum(file.metadata.row_group(index).num_rows for index in range(part.start))
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        text = _checked(value.as_py(), text_field)
                    except UnicodeDecodeError:
                        raise ValueError(f"{part.path}, row {row} is not UTF-8: write it anew as UTF-8.") from None
                    except ValueError as error:
                        raise ValueError(f"{part.path}, row {row} {error}") from None
                    yield text
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{part.path} is not a readable parquet file ({reason}): write it anew.") from None
