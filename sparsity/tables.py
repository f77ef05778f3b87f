"""Tables through which one launch of a Triton kernel finds the blocks of many tensors.

Tables are cached by the pointers that they hold, so a parameter that FSDP2 moved between events gets a new table. Nothing here
waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsity.shards import ParameterShard


@dataclass(frozen=True)
class Shape:
    """Elements of a block and warps of a program; `python -m tests.benchmarks.event` measures the best values."""

    block: int
    num_warps: int


class Row(NamedTuple):
    """Pointers of tensors of one type and size that share a mask, with a number for the kernel."""

    dtype: torch.dtype
    numel: int
    number: int
    mask: int
    pointers: tuple[int, ...]


Rows = tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """The rows of one launch. They agree in type, number of pointers, and alignment to 16 bytes."""

    rows: Tensor
    owners: Tensor
    dtype: torch.dtype
    is_aligned: bool

    def launch(self, kernel: Any, *args: Any, shape: Shape, **constants: Any) -> None:
        """Run a kernel with one program for each block of the table."""
        is_cuda = self.rows.is_cuda
        with torch.cuda.device(self.rows.device) if is_cuda else contextlib.nullcontext():
            kernel[(len(self.owners),)](
                self.rows,
                self.owners,
                *args,
                WIDTH=self.rows.shape[1],
                ALIGNED=self.is_aligned,
                BLOCK=shape.block,
                num_warps=shape.num_warps,
                **constants,
            )


@lru_cache(maxsize=16)
def make_tables(rows: Rows, block: int, device: torch.device, may_align: bool = True) -> list[Table]:
    """Return the tables of these rows, in blocks of `block` elements; `may_align` gives aligned rows their own tables."""
    groups: dict[tuple[torch.dtype, int, bool], list[Row]] = {}
    for row in rows:
        is_aligned = may_align and all(pointer % 16 == 0 for pointer in (row.mask, *row.pointers))
        if row.numel:
            groups.setdefault((row.dtype, len(row.pointers), is_aligned), []).append(row)
    found = []
    for (dtype, _, is_aligned), group in groups.items():
        num_blocks = np.array([-(-row.numel // block) for row in group])
        first = np.cumsum(num_blocks) - num_blocks
        columns = [
            (row.numel, begin, row.number, row.mask, *row.pointers) for row, begin in zip(group, first, strict=True)
        ]
        on_device = copied_to(np.array(columns, dtype=np.int64), device)
        numbers = torch.arange(len(group), dtype=torch.int32, device=device)
        owners = torch.repeat_interleave(numbers, copied_to(num_blocks, device), output_size=int(num_blocks.sum()))
        found.append(Table(on_device, owners, dtype, is_aligned))
    return found


def copied_to(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy without waiting: the driver has already read pageable memory when the call returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def rows_of(shards: Sequence[ParameterShard]) -> Rows:
    """Return a row for each shard, with its position as its number."""
    return tuple(
        Row(shard.values.dtype, shard.values.numel(), number, shard.mask.data_ptr(), (shard.values.data_ptr(),))
        for number, shard in enumerate(shards)
    )


def rows_of_masks(shards: Sequence[ParameterShard]) -> Rows:
    """Return a row without pointers for the mask of each shard."""
    return tuple(Row(s.mask.dtype, s.mask.numel(), number, s.mask.data_ptr(), ()) for number, s in enumerate(shards))
