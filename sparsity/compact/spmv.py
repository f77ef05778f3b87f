"""The product of a sparse matrix and a few vectors in one Triton kernel. Importing this needs Triton.

The matrix is a `Packed` (`sparsity.compact.packed`). Every kept weight is read once for all vectors, 8 weights at a time;
pruned weights are not read. `TRITON_INTERPRET=1` runs the kernel on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsity.compact.packed import Packed


class Shape(NamedTuple):
    """The size of a program: its rows, the chunks of a row that it reads at once, and its warps."""

    rows: int
    chunks: int
    num_warps: int


MANY_CHUNKS = 1 << 13
"""This many chunks are enough work for all warps of a GPU."""


def shape_for(num_rows: int, num_chunks: int) -> Shape:
    """Return the shape for `num_rows` rows of `num_chunks` chunks each; a warp reads one chunk.

    These shapes were the fastest on an H100 for the layers of a 1B model (`tests/benchmarks/decode_variants.py`). If rows have
    many chunks, four are read at a time. If they have few and the layer is large, chunks are read one after the other.
    """
    chunks = 4 if num_chunks > 6 else triton.next_power_of_2(min(4, num_chunks))
    if num_chunks <= 6 and num_rows * num_chunks >= MANY_CHUNKS:
        chunks = 1
    num_warps = 8 if num_chunks <= 8 and num_rows * num_chunks >= MANY_CHUNKS else 4
    return Shape(max(1, num_warps // chunks), chunks, num_warps)


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    values, offsets, bases, starts, scales, x, bias, y, num_vectors, num_rows, num_chunks,
    HAS_BASES: tl.constexpr, SHIFT: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, VECTORS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute y[vector, row] for `ROWS` rows and all vectors; products are summed in float32, always in the same order."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.load(starts + row, mask=row < num_rows, other=0)
    stop = tl.load(starts + row + 1, mask=row < num_rows, other=0)
    # Lanes are the first dimension: among equally contiguous dimensions Triton spreads a warp over the first.
    start, lanes = start[None, None, :], ((stop - start) // num_chunks)[None, None, :]
    lane, slot = tl.arange(0, 32)[:, None, None], tl.arange(0, 8)[None, None, None, :]
    vector = tl.arange(0, VECTORS)
    total = tl.zeros([32, CHUNKS, ROWS, VECTORS], tl.float32)
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
            column += tl.load(bases + group, mask=is_there, other=0).to(tl.uint32) << SHIFT
        if EARLY:
            # Only x may come from the kernel before; loads of the first step's weights have been issued by now.
            gdc_wait()
        # If there is no weight, the column is 0. Columns are unsigned, because a signed sum costs a second 64-bit addition.
        found = tl.load(x + (column[:, :, :, :, None] * VECTORS + vector[None, None, None, None, :])).to(tl.float32)
        if HAS_SCALES:
            # This equals a conversion, whose throughput is only a quarter of an addition's.
            number = (value.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
        else:
            number = value.to(tl.float32)
        total += tl.sum(number[:, :, :, :, None] * found, 3)
    result = tl.sum(tl.sum(total, 0), 0)
    if HAS_SCALES:
        result *= tl.load(scales + row, mask=row < num_rows, other=0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < num_rows, other=0).to(tl.float32)[:, None]
    place = vector[None, :].to(tl.int64) * num_rows + row[:, None]
    is_there = (vector < num_vectors)[None, :] & (row < num_rows)[:, None]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=is_there)


def spmv(
    packed: Packed, x: Tensor, bias: Tensor | None = None, shape: Shape | None = None, early: bool | None = None
) -> Tensor:
    """Return `x @ W.T + bias` for the few vectors x [batch, columns].

    Args:
        packed: W.
        x: Vectors on W's device, in any floating-point type, which the result has too.
        bias: One number for each row of W.
        shape: The size of each program; None: `shape_for`.
        early: Whether to start before the previous kernel in the stream ends, reading weights meanwhile; None:
            `can_start_early`. The weights must have been written before that kernel was launched.

    Raises:
        ValueError: x is not a matrix with as many columns as W.
    """
    if x.dim() != 2 or x.shape[1] != packed.columns:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {packed.columns} columns")
    num_rows = packed.rows
    y = torch.empty(x.shape[0], num_rows, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if packed.values.numel() == 0:
        return y.copy_(y.new_zeros(()) if bias is None else bias)
    shape = shape or shape_for(num_rows, packed.num_chunks)
    early = can_start_early(x.device) if early is None else early
    num_vectors = triton.next_power_of_2(len(x))
    options = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):
        multiply[(triton.cdiv(num_rows, shape.rows),)](
            packed.values, packed.offsets, packed.bases, packed.starts, packed.scales if packed.scales is not None else y,
            _by_column(x, num_vectors), bias if bias is not None else y, y, len(x), num_rows, packed.num_chunks,
            HAS_BASES=packed.bases.numel() > 0, SHIFT=packed.shift, HAS_SCALES=packed.scales is not None,
            HAS_BIAS=bias is not None, VECTORS=num_vectors, ROWS=shape.rows, CHUNKS=shape.chunks,
            STEPS=triton.cdiv(packed.num_chunks, shape.chunks), EARLY=early, num_warps=shape.num_warps, **options,
        )  # fmt: skip
    return y


@cache
def can_start_early(device: torch.device) -> bool:
    """Return whether kernels may start before the previous one ends, as on Hopper GPUs and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _by_column(x: Tensor, num_vectors: int) -> Tensor:
    """Transpose the vectors, so that one read gives a column of all of them.

    The padding to a power of two is not initialized, because its results are never stored.
    """
    if len(x) == 1:
        return x.contiguous()
    found = x.new_empty(x.shape[1], num_vectors)
    found[:, : len(x)] = x.t()
    return found
