"""A sparse matrix times a few vectors in one Triton kernel. Importing this needs Triton.

The matrix is a `Packed` (`sparsity.compact.packed`). Every kept weight is read once, in vectors of 16 bytes, and no pruned one
is visited. `TRITON_INTERPRET=1` runs the kernel on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity.compact.packed import Packed


class Shape(NamedTuple):
    """Rows of a program, chunks of a row that it reads at once, and its warps."""

    rows: int
    chunks: int
    num_warps: int


MANY_CHUNKS = 1 << 13
"""From so many on there is work for all of a GPU's warps, a chunk each, if half a row is read at once."""


def shape_for(num_rows: int, num_chunks: int) -> Shape:
    """Return the shape for so many rows of so many chunks: 4 warps of a chunk each, and of large layers half a row at once.

    These were the fastest of some 25 shapes on an H200, for the layers of a 1B at a density of 0.2
    (`tests/benchmarks/decode.py`).
    """
    chunks = min(8, triton.next_power_of_2(num_chunks))
    if num_rows * num_chunks >= MANY_CHUNKS:
        chunks = max(1, chunks // 2)
    return Shape(max(1, 4 // chunks), chunks, 4)


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    values, offsets, bases, starts, x, bias, y, num_vectors, num_rows, num_columns, num_chunks,
    HAS_BASES: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y[batch, row] of `ROWS` rows and one vector; products are summed in float32, always in the same order."""
    # Vectors first: programs that run together read the same weights.
    batch = (tl.program_id(0) % num_vectors).to(tl.int64)
    row = tl.program_id(0) // num_vectors * ROWS + tl.arange(0, ROWS)
    start = tl.load(starts + row, mask=row < num_rows, other=0)
    stop = tl.load(starts + row + 1, mask=row < num_rows, other=0)
    # Lanes come first: among dimensions of equal contiguity Triton gives a warp the first.
    start, lanes = start[None, None, :], ((stop - start) // num_chunks)[None, None, :]
    lane, slot = tl.arange(0, 32)[:, None, None], tl.arange(0, 8)[None, None, None, :]
    x += batch * num_columns
    total = tl.zeros([32, CHUNKS, ROWS], tl.float32)
    for step in range(STEPS):
        chunk = (step * CHUNKS + tl.arange(0, CHUNKS))[None, :, None]
        is_there = ((lane < lanes) & (chunk < num_chunks))[:, :, :, None]
        is_there = tl.broadcast_to(is_there, [32, CHUNKS, ROWS, 8])
        place = (start + chunk * lanes + lane).to(tl.int64)[:, :, :, None] * 8 + slot
        value = tl.load(values + place, mask=is_there, other=0, eviction_policy="evict_first")
        column = tl.load(offsets + place, mask=is_there, other=0, eviction_policy="evict_first").to(tl.uint32)
        if HAS_BASES:
            group = (row.to(tl.int64)[None, None, :] * num_chunks + chunk)[:, :, :, None] * 8 + slot
            group = tl.broadcast_to(group, [32, CHUNKS, ROWS, 8])
            column += tl.load(bases + group, mask=is_there, other=0).to(tl.uint32)
        # Where no weight is, the column is 0. Unsigned: a signed sum would cost a second addition of 64 bits.
        total += tl.sum(value.to(tl.float32) * tl.load(x + column).to(tl.float32), 3)
    result = tl.sum(tl.sum(total, 0), 0)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < num_rows, other=0).to(tl.float32)
    tl.store(y + batch * num_rows + row, result.to(y.dtype.element_ty), mask=row < num_rows)


def spmv(packed: Packed, x: Tensor, bias: Tensor | None = None, shape: Shape | None = None) -> Tensor:
    """Return `x @ W.T + bias` for the few vectors x [batch, columns].

    Args:
        packed: W.
        x: Vectors on W's device, in any floating-point type; the result has the same.
        bias: One number a row.
        shape: How the work is split; the default is `shape_for`.

    Raises:
        ValueError: x is no matrix of W's columns.
    """
    if x.dim() != 2 or x.shape[1] != packed.columns:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {packed.columns} columns")
    num_rows = packed.counts.numel()
    y = torch.empty(x.shape[0], num_rows, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if packed.values.numel() == 0:
        return y.copy_(y.new_zeros(()) if bias is None else bias)
    shape = shape or shape_for(num_rows, packed.num_chunks)
    with torch.cuda.device_of(x):
        multiply[(len(x) * triton.cdiv(num_rows, shape.rows),)](
            packed.values, packed.offsets, packed.bases, packed.starts, x.contiguous(), y if bias is None else bias, y,
            len(x), num_rows, packed.columns, packed.num_chunks, HAS_BASES=packed.bases.numel() > 0, HAS_BIAS=bias is not None,
            ROWS=shape.rows, CHUNKS=shape.chunks, STEPS=triton.cdiv(packed.num_chunks, shape.chunks), num_warps=shape.num_warps,
        )  # fmt: skip
    return y
