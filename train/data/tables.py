"""Documents in the rows of tables: CSV and parquet files."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import Any

from train.data.encoding import MANY_NULS, has_many_nuls, not_utf8
from train.data.fields import MISSING, checked_text, field_names, field_of
from train.data.parts import Part, explained
from train.data.skipped import Skipped, leave_out


def read_csv(part: Part, text_field: str, skipped: Skipped | None) -> Iterator[str]:
    """Yield the values of the column that the first line calls `text_field`; arguments as in `read_documents`."""
    # Bytes that are not UTF-8 become surrogates, so that they spoil one row and not the rest of the file.
    with (
        explained(part.path),
        open(part.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(file, strict=True)
        column = _csv_column(part.path, next(rows, []), text_field)
        while True:
            try:
                row = next(rows)
                if len(row) > column:
                    row[column].encode()
                    yield row[column]
                elif row:
                    problem = f"has {len(row)} columns, so none for {text_field}: fix it."
                    leave_out(f"{part.path}, line {rows.line_num} {problem}", skipped)
            except StopIteration:
                return
            except csv.Error as error:
                leave_out(f"{part.path}, line {rows.line_num} is not CSV ({error}): fix it.", skipped)
            except UnicodeEncodeError:
                leave_out(f"{part.path}, line {rows.line_num} {not_utf8(part.path)}", skipped)


def _csv_column(path: str, names: list[str], text_field: str) -> int:
    """Return the index of the text's column, or raise a ValueError about the first line."""
    line = ",".join(names).encode(errors="surrogateescape")
    try:
        line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line 1 {not_utf8(path)}") from None
    if has_many_nuls(line):
        raise ValueError(f"{path}, line 1 {MANY_NULS}")
    if text_field not in names:
        found = f"only {field_names(names)}" if names else "because it is empty"
        raise ValueError(
            f"{path} has no column {text_field} in its first line, {found}: name the column with the text in "
            "data.text_field."
        )
    _check_single(path, names, text_field)
    return names.index(text_field)


def _check_single(path: str, names: list[str], name: str) -> None:
    if (count := names.count(name)) > 1:
        raise ValueError(f"{path} has {count} columns called {name}: rename all but the one with the text.")


def read_parquet(part: Part, text_field: str, skipped: Skipped | None) -> Iterator[str]:
    """Yield the values of the column `text_field`, or of a field of a struct column; arguments as in `read_documents`."""
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
            _check_single(part.path, names, column)
            row = -1 + sum(file.metadata.row_group(index).num_rows for index in range(part.start))
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    try:
                        yield checked_text(_found({column: value.as_py()}, text_field), text_field)
                    except UnicodeDecodeError:
                        leave_out(f"{part.path}, row {row} is not UTF-8: write it again as UTF-8.", skipped)
                    except ValueError as error:
                        leave_out(f"{part.path}, row {row} {error}", skipped)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{part.path} is not a readable parquet file ({reason}): write it again.") from None


def _found(row: dict[str, Any], text_field: str) -> Any:
    value = field_of(row, text_field)
    if value is MISSING:
        raise ValueError(f"has nothing at {text_field}: give the path of a string in data.text_field.")
    return value
