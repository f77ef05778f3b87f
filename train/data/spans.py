"""Stretches of ids in files, and those of a dataset that `Dataset.save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMN = "input_ids"


@dataclass(frozen=True)
class Span:
    """A stretch of consecutive ids in a file."""

    file: str
    offset: int
    """The offset of the first id in bytes."""
    dtype: str
    num_tokens: int
    starts: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    """The positions at which documents begin; None if only the separators between documents show them."""

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the ids start..stop-1 as a view of the file."""
        width = np.dtype(self.dtype).itemsize
        if self.num_tokens == 0:
            return np.empty(0, self.dtype)
        data = np.memmap(self.file, np.uint8, mode="r", offset=0)
        ids = data[self.offset : self.offset + self.num_tokens * width].view(self.dtype)
        return ids[start : self.num_tokens if stop is None else stop]


def dataset_spans(file: Path) -> Iterator[Span]:
    """Yield the ids of each batch of rows in an arrow file of a saved dataset; each row is a document.

    Raises:
        ValueError: There is no column of lists of ids.
    """
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        base, size = source.read_buffer().address, source.size()
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        if COLUMN not in reader.schema.names:
            raise ValueError(
                f"{file.parent} has no column {COLUMN}, only {', '.join(reader.schema.names)}: save the ids in one."
            )
        kind = reader.schema.field(COLUMN).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise ValueError(f"{file.parent} has a column {COLUMN} of type {kind}: give lists of ids.")
        for batch in reader:
            column = batch.column(COLUMN)
            ids = column.flatten()
            if column.null_count or ids.null_count:
                raise ValueError(f"{file.parent} has nulls in the column {COLUMN}: leave out those rows.")
            if len(ids) == 0:
                continue
            dtype = np.dtype(kind.value_type.to_pandas_dtype()).newbyteorder("<")
            offset = ids.buffers()[1].address + ids.offset * dtype.itemsize - base
            if not 0 <= offset <= size - len(ids) * dtype.itemsize:
                raise ValueError(
                    f"{file} is compressed, so its ids cannot be read in place: save it without compression."
                )
            if pa.types.is_fixed_size_list(kind):
                starts = np.arange(len(column), dtype=np.int64) * kind.list_size
            else:
                starts = np.asarray(column.offsets)[:-1].astype(np.int64)
                starts = starts - starts[0]
            # An empty row at the end would begin after the last id.
            yield Span(str(file), offset, dtype.str, len(ids), starts[starts < len(ids)])
