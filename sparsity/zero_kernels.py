"""Triton kernels that write 0 into pruned weights, optimizer states and gradients. Importing this needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsity.kernels import MASK, POINTERS, block_of, load_block, pointer_to


@triton.jit
def _zero_block(pointer, values, kept, left, MODE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write 0 wherever `kept` is 0, in the way that MODE says, see `zero`. Mode "store" does not read `values`."""
    index = tl.arange(0, BLOCK)
    is_pruned = kept == 0
    if not FULL:
        is_pruned = is_pruned & (index < left)
    if MODE == "store":
        tl.store(pointer + index, tl.zeros([BLOCK], pointer.dtype.element_ty), mask=is_pruned)
    elif MODE == "change":
        tl.store(pointer + index, tl.zeros_like(values), mask=is_pruned & (values != 0))
    elif FULL:
        tl.store(pointer + index, tl.where(is_pruned, 0, values))
    else:
        tl.store(pointer + index, tl.where(is_pruned, 0, values), mask=index < left)


@triton.jit
def _zero_columns(  # type: ignore[no-untyped-def]
    row, start, kept, left,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Apply `_zero_block` to every tensor of a row; each tensor is read before the previous one is written."""
    pointer, values = pointer_to(row, POINTERS, start, DTYPE, ALIGNED), kept
    if MODE != "store":
        values = load_block(pointer, left, BLOCK, FULL)
    for column in tl.static_range(POINTERS, WIDTH):
        here, found = pointer, values
        if column + 1 < WIDTH:
            pointer = pointer_to(row, column + 1, start, DTYPE, ALIGNED)
            if MODE != "store":
                values = load_block(pointer, left, BLOCK, FULL)
        _zero_block(here, found, kept, left, MODE, BLOCK, FULL)


@triton.jit
def zero(  # type: ignore[no-untyped-def]
    rows, owners, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Write 0 into all tensors of a row wherever its mask is 0, reading the mask once. Tensors are viewed as integers.

    MODE "store" reads no values and writes every pruned element; "change" reads the values and writes only pruned elements
    that are not 0 yet; "rewrite" reads and writes all elements, in vectors.
    """
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    mask = pointer_to(row, MASK, start, tl.int8, ALIGNED)
    if left == BLOCK:
        kept = load_block(mask, left, BLOCK, True)
        _zero_columns(row, start, kept, left, WIDTH, DTYPE, ALIGNED, BLOCK, MODE, True)
    else:
        kept = load_block(mask, left, BLOCK, False)
        _zero_columns(row, start, kept, left, WIDTH, DTYPE, ALIGNED, BLOCK, MODE, False)


@triton.jit
def _zero_alone(tensor, mask, left, MODE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    kept = load_block(mask, left, BLOCK, FULL)
    values = kept
    if MODE != "store":
        values = load_block(tensor, left, BLOCK, FULL)
    _zero_block(tensor, values, kept, left, MODE, BLOCK, FULL)


@triton.jit(do_not_specialize=["numel"], do_not_specialize_on_alignment=["tensor", "mask"])
def zero_one(tensor, mask, numel, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply `zero` to one tensor, a gradient, without a table. ALIGNED promises that both are aligned to 16 bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    tensor += start
    mask += start
    if ALIGNED:
        tensor = tl.multiple_of(tensor, [16])
        mask = tl.multiple_of(mask, [16])
    if left == BLOCK:
        _zero_alone(tensor, mask, left, MODE, BLOCK, True)
    else:
        _zero_alone(tensor, mask, left, MODE, BLOCK, False)
