"""Triton kernels of a prune event: one launch visits the blocks of all shards. Importing this needs Triton.

Kernels here select weights and set masks; those that write zeros are in `sparsity.zero_kernels`. A kernel finds its block
through a table (`sparsity.tables`): `owners` [blocks] gives the row of each block in `rows`
[rows, WIDTH]. A row has the columns NUMEL (elements), FIRST (its first block), NUMBER (the caller's number for it), MASK and
the pointers. `TRITON_INTERPRET=1` runs the kernels on a CPU, where the tests compare them with plain torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMEL = tl.constexpr(0)
FIRST = tl.constexpr(1)
NUMBER = tl.constexpr(2)
MASK = tl.constexpr(3)
POINTERS = tl.constexpr(4)


@triton.jit
def block_of(rows, owners, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's row, where its block begins in it, and how many elements the block has."""
    row = rows + tl.load(owners + tl.program_id(0)).to(tl.int64) * WIDTH
    start = (tl.program_id(0) - tl.load(row + FIRST)) * BLOCK
    left = tl.minimum(tl.load(row + NUMEL) - start, BLOCK).to(tl.int32)
    return row, start, left


@triton.jit
def pointer_to(row, column, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the address of the block in a column's tensor; ALIGNED promises that the tensor is aligned to 16 bytes."""
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    return pointer + start


@triton.jit
def load_block(pointer, left, BLOCK: tl.constexpr, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a block's elements, 0 after the last. A whole block needs no mask, so its loads are vectorized."""
    index = tl.arange(0, BLOCK)
    if FULL:
        return tl.load(pointer + index)
    return tl.load(pointer + index, mask=index < left, other=0)


@triton.jit
def _as_keys(values):  # type: ignore[no-untyped-def]
    """Return the bits of |w| as float32; values are float32 bits (int32), bfloat16 bits (int16) or float16."""
    if values.dtype == tl.int16:
        bits = values.to(tl.int32) << 16
    elif values.dtype == tl.float16:
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        bits = values
    return bits & 0x7FFFFFFF


@triton.jit
def _collect_block(  # type: ignore[no-untyped-def]
    pointer, left, shard, lo, last, room, keys, shards, cursor, below,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    num_below = tl.zeros([PIECE], tl.int32)
    values = load_block(pointer, left, PIECE, FULL)
    for first in range(0, BLOCK, PIECE):
        found, following = _as_keys(values), first + PIECE
        # Load the next piece now, so that it arrives during the atomics of this one.
        if FULL:
            values = tl.load(pointer + following + tl.arange(0, PIECE), mask=following < BLOCK, other=0)
        else:
            values = load_block(pointer + following, left - following, PIECE, False)
        is_below, is_within = found < lo, (found >= lo) & (found <= last)
        if not FULL:
            there = tl.arange(0, PIECE) < left - first
            is_below, is_within = is_below & there, is_within & there
        num_below += is_below.to(tl.int32)
        place = tl.atomic_add(cursor + tl.zeros_like(found), 1, mask=is_within, sem="relaxed")
        fits = is_within & (place < room)
        tl.store(keys + place, found, mask=fits)
        tl.store(shards + place, tl.zeros_like(found) + shard, mask=fits)
    tl.store(below + tl.program_id(0), tl.sum(num_below, 0))


@triton.jit(do_not_specialize=["lo", "last", "num_segments", "room"])
def collect(  # type: ignore[no-untyped-def]
    rows, owners, lo, last, num_segments, room, keys, shards, cursors, below,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Append keys lo .. last and their shards' numbers to segments of `room` places; count the keys below lo by block.

    Blocks are spread over the segments in turn. Each key reserves its place with an atomic: keys are so few that this is
    cheaper than a prefix sum over the block. Keys beyond `room` are counted but not stored. A block is read in pieces.
    """
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    pointer, shard = pointer_to(row, POINTERS, start, DTYPE, ALIGNED), tl.load(row + NUMBER).to(tl.int32)
    segment = (tl.program_id(0) % num_segments).to(tl.int64)
    keys, shards, cursor = keys + segment * room, shards + segment * room, cursors + segment
    if left == BLOCK:
        _collect_block(pointer, left, shard, lo, last, room, keys, shards, cursor, below, BLOCK, PIECE, True)
    else:
        _collect_block(pointer, left, shard, lo, last, room, keys, shards, cursor, below, BLOCK, PIECE, False)


@triton.jit
def _count_bins_block(pointer, left, lo, last, shift, counts, below, BLOCK: tl.constexpr, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    found = _as_keys(load_block(pointer, left, BLOCK, FULL))
    is_below, is_within = found < lo, (found >= lo) & (found <= last)
    if not FULL:
        there = tl.arange(0, BLOCK) < left
        is_below, is_within = is_below & there, is_within & there
    tl.store(below + tl.program_id(0), tl.sum(is_below.to(tl.int32), 0))
    tl.atomic_add(counts + ((found - lo) >> shift), 1, mask=is_within, sem="relaxed")


@triton.jit(do_not_specialize=["lo", "last", "shift", "num_bins", "num_copies"])
def count_bins(  # type: ignore[no-untyped-def]
    rows, owners, lo, last, shift, counts, num_bins, num_copies, below,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the keys lo .. last in bins: for each shard if `num_copies` is 0, else in `num_copies` histograms to be summed.

    Blocks are spread over the copies in turn, so that atomics on the same bin do not all wait for one address.
    """
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    pointer = pointer_to(row, POINTERS, start, DTYPE, ALIGNED)
    histogram = tl.load(row + NUMBER) if num_copies == 0 else (tl.program_id(0) % num_copies).to(tl.int64)
    counts += histogram * num_bins
    if left == BLOCK:
        _count_bins_block(pointer, left, lo, last, shift, counts, below, BLOCK, True)
    else:
        _count_bins_block(pointer, left, lo, last, shift, counts, below, BLOCK, False)


@triton.jit(do_not_specialize=["numel", "lo", "last", "shift", "num_bits", "num_copies"])
def count_digits(  # type: ignore[no-untyped-def]
    keys, numel, lo, last, shift, num_bits, prefixes, counts, num_copies, NUM: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the keys lo .. last by a digit, bits `shift` .. `shift` + `num_bits` - 1 of key - lo, in `NUM` histograms.

    Histogram i counts the keys whose higher bits are `prefixes`[i], which only the device knows. Each histogram is split
    into `num_copies` to be summed, as in `count_bins`.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    found = load_block(keys + start, left, BLOCK, False)
    is_within = (tl.arange(0, BLOCK) < left) & (found >= lo) & (found <= last)
    digit = ((found - lo) >> shift) & ((1 << num_bits) - 1)
    counts += (((tl.program_id(0) % num_copies) * NUM) << num_bits).to(tl.int64)
    for number in tl.static_range(NUM):
        has_prefix = ((found - lo) >> (shift + num_bits)) == tl.load(prefixes + number).to(tl.int32)
        tl.atomic_add(counts + (number << num_bits) + digit, 1, mask=is_within & has_prefix, sem="relaxed")


@triton.jit(do_not_specialize=["stride"])
def sample(  # type: ignore[no-untyped-def]
    rows, owners, stride, keys, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the keys of every `stride`-th weight to `keys`, starting at NUMBER."""
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    index = tl.arange(0, BLOCK)
    pointer = pointer_to(row, POINTERS, start * stride, DTYPE, False)
    found = _as_keys(tl.load(pointer + index.to(tl.int64) * stride, mask=index < left, other=0))
    tl.store(keys + tl.load(row + NUMBER) + start + index, found, mask=index < left)


@triton.jit
def keep_above(  # type: ignore[no-untyped-def]
    rows, owners, bounds, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Set masks that keep keys above `bounds`[NUMBER]."""
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    pointer, mask = pointer_to(row, POINTERS, start, DTYPE, ALIGNED), pointer_to(row, MASK, start, tl.int8, ALIGNED)
    bound, index = tl.load(bounds + tl.load(row + NUMBER)), tl.arange(0, BLOCK)
    if left == BLOCK:
        found = _as_keys(load_block(pointer, left, BLOCK, True))
        tl.store(mask + index, (found > bound).to(tl.int8))
    else:
        found = _as_keys(load_block(pointer, left, BLOCK, False))
        tl.store(mask + index, (found > bound).to(tl.int8), mask=index < left)


@triton.jit(do_not_specialize=["key"])
def count_ties(  # type: ignore[no-untyped-def]
    rows, owners, key, ties, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the kept weights of each block that have this key."""
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    pointer, mask = pointer_to(row, POINTERS, start, DTYPE, ALIGNED), pointer_to(row, MASK, start, tl.int8, ALIGNED)
    # After the last weight, the mask is loaded as 0.
    is_tie = (_as_keys(load_block(pointer, left, BLOCK, False)) == key) & (load_block(mask, left, BLOCK, False) != 0)
    tl.store(ties + tl.program_id(0), tl.sum(is_tie.to(tl.int32), 0))


@triton.jit(do_not_specialize=["key", "num_dropped"])
def keep_after_ties(  # type: ignore[no-untyped-def]
    rows, owners, key, ties_before, num_dropped,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set masks that keep keys above `key`, and of the kept weights with this key all but the first `num_dropped`."""
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    pointer, mask = pointer_to(row, POINTERS, start, DTYPE, ALIGNED), pointer_to(row, MASK, start, tl.int8, ALIGNED)
    found, index = _as_keys(load_block(pointer, left, BLOCK, False)), tl.arange(0, BLOCK)
    is_tie = (found == key) & (load_block(mask, left, BLOCK, False) != 0)
    place = tl.load(ties_before + tl.program_id(0)) + tl.cumsum(is_tie.to(tl.int32), 0)
    keep = (found > key) | (is_tie & (place > num_dropped))
    tl.store(mask + index, keep.to(tl.int8), mask=index < left)


@triton.jit
def count_kept(rows, owners, counts, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the number of kept weights of each block to `counts`[NUMBER], with one atomic for each block."""
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    mask = pointer_to(row, MASK, start, tl.int8, ALIGNED)
    if left == BLOCK:
        num_kept = tl.sum(load_block(mask, left, BLOCK, True).to(tl.int32), 0)
    else:
        num_kept = tl.sum(load_block(mask, left, BLOCK, False).to(tl.int32), 0)
    tl.atomic_add(counts + tl.load(row + NUMBER), num_kept, sem="relaxed")


@triton.jit
def hash_masks(  # type: ignore[no-untyped-def]
    rows, owners, factors, digests, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum `factors`, int64 [BLOCK], over the kept weights of each block."""
    row, start, left = block_of(rows, owners, WIDTH, BLOCK)
    kept = load_block(pointer_to(row, MASK, start, tl.int8, ALIGNED), left, BLOCK, False)
    factor = tl.load(factors + tl.arange(0, BLOCK))
    tl.store(digests + tl.program_id(0), tl.sum(tl.where(kept != 0, factor, 0), 0))
