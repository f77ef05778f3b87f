"""The passes of a prune event on a GPU: one launch each over all shards of a type. Importing this needs Triton.

A launch finds the shards through a table (`sparsity.tables`). The passes of a selection take its `rows` (`rows_of`), because
making them takes longer than a small kernel; None makes them. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsity import kernels, zero_kernels
from sparsity.shards import ParameterShard
from sparsity.tables import Row, Rows, Shape, Table, copied_to, make_tables, rows_of, rows_of_masks

NUM_COPIES = 32
"""The number of copies of a histogram; they are counted separately and then summed."""
MOST_SEGMENTS, LEAST_ROOM = 1 << 10, 1 << 12
"""The most segments of the buffer for collected keys, each with its own cursor, and the fewest places in a segment."""
_READ_AS = {torch.float32: tl.int32, torch.int32: tl.int32, torch.bfloat16: tl.int16, torch.float16: tl.float16}
_AS_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_WRITTEN_AS = {torch.int32: tl.int32, torch.int16: tl.int16}

COLLECT = Shape(1 << 13, 4)
PIECE = 1 << 8
"""Elements that `collect` reads at a time for each warp."""
COUNT_BINS = Shape(1 << 12, 8)
COUNT_DIGITS = Shape(1 << 11, 4)
SAMPLE = Shape(1 << 10, 4)
KEEP = Shape(1 << 14, 4)
KEEP_TIES = Shape(1 << 12, 8)
COUNT_KEPT = Shape(1 << 14, 4)
HASH = Shape(1 << 12, 8)
ZERO, ZERO_MODE = Shape(1 << 11, 8), "change"
"""Only weights that change are written, because at an event most pruned weights are 0 already."""
ZERO_GRADIENT, ZERO_GRADIENT_MODE = Shape(1 << 10, 8), "rewrite"
"""Most pruned gradients are not 0: writing whole vectors moves fewer bytes than scattered writes."""


def sample(
    shards: Sequence[ParameterShard],
    starts: Sequence[int],
    sizes: Sequence[int],
    stride: int,
    shape: Shape = SAMPLE,
    rows: Rows | None = None,
) -> Tensor:
    """Return keys int32 [sum of sizes]: for each shard `sizes` weights, `stride` apart, beginning at `starts`."""
    device = shards[0].values.device
    keys = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    filled = np.cumsum([0, *sizes]).tolist()
    few = tuple(
        Row(row.dtype, size, number, 0, (row.pointers[0] + start * row.dtype.itemsize,))
        for row, start, size, number in zip(rows or rows_of(shards), starts, sizes, filled[:-1], strict=True)
    )
    for table in make_tables(few, shape.block, device):
        table.launch(kernels.sample, stride, keys, DTYPE=_READ_AS[table.dtype], shape=shape)
    return keys


def collect(
    shards: Sequence[ParameterShard],
    lo: int,
    hi: int,
    limit: int,
    shape: Shape = COLLECT,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collect the keys lo .. hi - 1 of all shards.

    Returns:
        Counts int64 [3] of the keys below `lo`, of those in the range, and of those in the range that did not fit; the
        collected keys, int32 [limit] in no order, with -1 in unused places; and the number of each key's shard.
    """
    device, numel = shards[0].values.device, sum(shard.values.numel() for shard in shards)
    # A cursor is an int32, so no segment may count 2^31 keys.
    num_segments = max(1, min(MOST_SEGMENTS, limit // LEAST_ROOM), numel >> 30)
    room = limit // num_segments
    keys = torch.full((limit,), -1, dtype=torch.int32, device=device)
    owners = torch.zeros(limit, dtype=torch.int16 if len(shards) < 1 << 15 else torch.int32, device=device)
    cursors = torch.zeros(num_segments, dtype=torch.int32, device=device)
    below = torch.zeros(1, dtype=torch.int64, device=device)
    for table in make_tables(rows or rows_of(shards), shape.block, device):
        partial = torch.empty_like(table.owners)
        table.launch(
            kernels.collect,
            lo,
            hi - 1,
            num_segments,
            room,
            keys,
            owners,
            cursors,
            partial,
            DTYPE=_READ_AS[table.dtype],
            PIECE=min(shape.block, PIECE * shape.num_warps),
            shape=shape,
        )
        below += partial.sum()
    lost = (cursors - room).clamp_(min=0)
    return torch.cat([below, cursors.sum(0, keepdim=True), lost.sum(0, keepdim=True)]), keys, owners


def count_by_shard(
    shards: Sequence[ParameterShard],
    lo: int,
    hi: int,
    shift: int,
    shape: Shape = COUNT_BINS,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """Count the keys below `lo`, int64 [1], and the keys lo .. hi - 1 in bins of 2^shift keys, int32 [shards, bins]."""
    device, num_bins = shards[0].values.device, ((hi - lo - 1) >> shift) + 1
    counts = torch.zeros((len(shards), num_bins), dtype=torch.int32, device=device)
    below = torch.zeros(1, dtype=torch.int64, device=device)
    for table in make_tables(rows or rows_of(shards), shape.block, device):
        below += _count_bins(table, lo, hi, shift, counts, 0, shape).sum()
    return below, counts


def histogram(
    tables: Iterable[Table], lo: int, hi: int, shift: int, device: torch.device, shape: Shape = COUNT_BINS
) -> Tensor:
    """Count the keys lo .. hi - 1 in bins of 2^shift keys, int64 [bins]."""
    counts = torch.zeros((NUM_COPIES, ((hi - lo - 1) >> shift) + 1), dtype=torch.int32, device=device)
    for table in tables:
        _count_bins(table, lo, hi, shift, counts, NUM_COPIES, shape)
    return counts.sum(dim=0)


def histogram_of_shards(
    shards: Sequence[ParameterShard], lo: int, hi: int, shift: int, rows: Rows | None = None
) -> Tensor:
    """Return the `histogram` of all weights."""
    device = shards[0].values.device
    return histogram(make_tables(rows or rows_of(shards), COUNT_BINS.block, device), lo, hi, shift, device)


def histogram_of_keys(keys: Tensor, lo: int, hi: int, shift: int) -> Tensor:
    """Return the `histogram` of int32 keys."""
    row = Row(keys.dtype, keys.numel(), 0, 0, (keys.data_ptr(),))
    return histogram(make_tables((row,), COUNT_BINS.block, keys.device), lo, hi, shift, keys.device)


def count_digits(
    keys: Tensor, lo: int, hi: int, shift: int, num_bits: int, prefixes: Tensor, shape: Shape = COUNT_DIGITS
) -> Tensor:
    """Count the keys lo .. hi - 1 by prefix and digit, int64 [prefixes, 2^num_bits].

    The digit is bits `shift` .. `shift` + `num_bits` - 1 of key - lo. The bits above it must be those of the prefix;
    `prefixes` are int64 on the device.
    """
    num = prefixes.numel()
    counts = torch.zeros((NUM_COPIES, num, 1 << num_bits), dtype=torch.int32, device=keys.device)
    if keys.numel():
        with torch.cuda.device(keys.device) if keys.is_cuda else contextlib.nullcontext():
            kernels.count_digits[(triton.cdiv(keys.numel(), shape.block),)](
                keys, keys.numel(), lo, hi - 1, shift, num_bits, prefixes, counts, NUM_COPIES,
                NUM=num, BLOCK=shape.block, num_warps=shape.num_warps,
            )  # fmt: skip
    return counts.sum(dim=0)


def _count_bins(table: Table, lo: int, hi: int, shift: int, counts: Tensor, num_copies: int, shape: Shape) -> Tensor:
    """Add to `counts` [shards or copies, bins]; return how many keys of each block are below `lo`."""
    below = torch.empty_like(table.owners)
    table.launch(
        kernels.count_bins,
        lo,
        hi - 1,
        shift,
        counts,
        counts.shape[1],
        num_copies,
        below,
        DTYPE=_READ_AS[table.dtype],
        shape=shape,
    )
    return below


def keep_above_(
    shards: Sequence[ParameterShard], keys: Sequence[int], shape: Shape = KEEP, rows: Rows | None = None
) -> None:
    """Set the masks: keep in each shard the weights above its key."""
    device = shards[0].values.device
    bounds = copied_to(np.array(keys, dtype=np.int32), device)
    for table in make_tables(rows or rows_of(shards), shape.block, device):
        table.launch(kernels.keep_above, bounds, DTYPE=_READ_AS[table.dtype], shape=shape)


def keep_after_ties_(shard: ParameterShard, key: int, num_dropped: int, shape: Shape = KEEP_TIES) -> None:
    """Set the mask: keep weights above `key`, and of the kept weights with this key all but the first `num_dropped`."""
    for table in make_tables(rows_of([shard]), shape.block, shard.values.device):
        ties = torch.empty_like(table.owners)
        table.launch(kernels.count_ties, key, ties, DTYPE=_READ_AS[table.dtype], shape=shape)
        before = torch.cumsum(ties, 0, dtype=torch.int32) - ties
        table.launch(kernels.keep_after_ties, key, before, num_dropped, DTYPE=_READ_AS[table.dtype], shape=shape)


def count_kept(shards: Sequence[ParameterShard], shape: Shape = COUNT_KEPT) -> Tensor:
    """Count the kept weights of each local shard, int64 [shards]."""
    counts = torch.zeros(len(shards), dtype=torch.int32, device=shards[0].mask.device)
    for table in make_tables(rows_of_masks(shards), shape.block, counts.device):
        table.launch(kernels.count_kept, counts, shape=shape)
    return counts.long()


def digests(shards: Sequence[ParameterShard], factors: Tensor, shape: Shape = HASH) -> Tensor:
    """Return a digest of each block of the masks, int64 [blocks]: the sum of `factors`, int64 [block], over kept weights."""
    found = [torch.empty(0, dtype=torch.int64, device=factors.device)]
    # All rows are in one table, so that replicas with differently aligned memory have the blocks in the same order.
    for table in make_tables(rows_of_masks(shards), shape.block, factors.device, may_align=False):
        found.append(torch.empty(len(table.owners), dtype=torch.int64, device=factors.device))
        table.launch(kernels.hash_masks, factors, found[-1], shape=shape)
    return torch.cat(found)


def can_zero(tensor: Tensor) -> bool:
    """Return whether `zero_` and `zero_all_` accept this tensor."""
    return tensor.dtype in _AS_BITS and tensor.is_contiguous()


def zero_all_(masked: Sequence[tuple[Tensor, Sequence[Tensor]]], shape: Shape = ZERO, mode: str = ZERO_MODE) -> None:
    """Write 0 into tensors wherever the mask in their pair is False; `can_zero` must hold for each tensor."""
    rows = []
    for mask, tensors in masked:
        by_type: dict[torch.dtype, list[int]] = {}
        for tensor in tensors:
            by_type.setdefault(_AS_BITS[tensor.dtype], []).append(tensor.data_ptr())
        rows += [Row(dtype, mask.numel(), 0, mask.data_ptr(), tuple(found)) for dtype, found in by_type.items()]
    if rows:
        for table in make_tables(tuple(rows), shape.block, masked[0][0].device):
            # Without alignment, neighbouring threads take neighbouring elements, so that a warp's writes stay close together.
            plain = table if mode == "rewrite" else Table(table.rows, table.owners, table.dtype, False)
            plain.launch(zero_kernels.zero, DTYPE=_WRITTEN_AS[table.dtype], MODE=mode, shape=shape)


def zero_(tensor: Tensor, mask: Tensor, shape: Shape = ZERO_GRADIENT, mode: str = ZERO_GRADIENT_MODE) -> None:
    """Write 0 into a tensor wherever its flat mask is False; `can_zero` must hold for the tensor."""
    if not tensor.numel():
        return
    bits, kept = tensor.view(_AS_BITS[tensor.dtype]), mask.view(torch.int8)
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        zero_kernels.zero_one[(triton.cdiv(bits.numel(), shape.block),)](
            bits, kept, bits.numel(),
            ALIGNED=bits.data_ptr() % 16 == 0 and kept.data_ptr() % 16 == 0, BLOCK=shape.block, MODE=mode,
            num_warps=shape.num_warps,
        )  # fmt: skip
