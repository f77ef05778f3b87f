"""Two Triton kernels for magnitudes on a GPU: each reads a shard once. Importing this needs Triton.

`TRITON_INTERPRET=1` runs them on a CPU, where the tests compare them with the other ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1 << 13
NUM_WARPS = 8


@triton.jit
def _keys(values, start, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of |w| as float32, and which of the block's elements there are."""
    index = start + tl.arange(0, BLOCK)
    there = index < numel
    bits = tl.load(values + index, mask=there, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return index, there, bits & 0x7FFFFFFF


@triton.jit
def _collect(values, numel, lo, last, limit, keys, cursor, below, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _, there, found = _keys(values, start, numel, BLOCK)
    within = (there & (found >= lo) & (found <= last)).to(tl.int32)
    tl.store(below + tl.program_id(0), tl.sum((there & (found < lo)).to(tl.int32), 0))
    num_within = tl.sum(within, 0)
    if num_within > 0:
        first = tl.atomic_add(cursor, num_within.to(tl.int64))
        target = first + tl.cumsum(within, 0) - 1
        fits = (within > 0) & (target < limit)
        tl.store(keys + target, found, mask=fits)


@triton.jit
def _keep_above(values, mask, numel, key, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place, there, found = _keys(values, start, numel, BLOCK)
    tl.store(mask + place, (found > key).to(tl.int8), mask=there)


def collect(values: Tensor, lo: int, hi: int, keys: Tensor, span: Tensor, below: Tensor) -> None:
    """Append the keys lo .. hi - 1 of a flat shard, in no order, behind those that `span[0]` counts.

    `span` int64 [2]: `span[1]` is set to the new count, which may exceed the room in `keys`; `below` int64 [] is
    increased by the number of keys under `lo`. No host sync.
    """
    span[1].copy_(span[0])
    numel = values.numel()
    if numel == 0:
        return
    num_blocks = triton.cdiv(numel, BLOCK)
    partial = torch.empty(num_blocks, dtype=torch.int32, device=values.device)
    _collect[(num_blocks,)](
        values, numel, lo, hi - 1, len(keys), keys, span[1:], partial, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    below += partial.sum()


def keep_above_(values: Tensor, mask: Tensor, key: int) -> None:
    """Set a flat bool mask: True where the key is above `key`. No host sync."""
    numel = values.numel()
    if numel:
        grid = (triton.cdiv(numel, BLOCK),)
        _keep_above[grid](values, mask.view(torch.int8), numel, key, BLOCK=BLOCK, num_warps=NUM_WARPS)
