"""Whole blocks of weights, kept or pruned by the sum of their scores.

A block is on one rank, so its sum has one order whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsity.pattern import Blocks
from sparsity.score import SIGN_OFF, Given, Score
from sparsity.select import Threshold, prune_smallest_
from sparsity.shards import ParameterShard, RankLayout, chunks


@torch.no_grad()
def prune_blocks_(
    shards: Sequence[ParameterShard],
    num_pruned: int,
    *,
    pattern: Blocks,
    score: Score,
    layout: RankLayout | None = None,
) -> Threshold | None:
    """Set the masks so that the blocks with the smallest keys are pruned, `num_pruned` weights in all; see `prune_smallest_`.

    Ties go to the lower (parameter, block), counted row of blocks by row of blocks.

    Collective: over the shard group.

    Args:
        shards: This rank's shards of the parameters in the pool: whole blocks.
        num_pruned: How many weights of the full parameters are pruned afterwards, a multiple of a block's size.
        pattern: The blocks.
        score: The score that ranks weights.
        layout: Which ranks hold the other shards; None: this rank holds all.
    """
    assert num_pruned % pattern.numel == 0, "the pruner asks for whole blocks"
    few = [
        ParameterShard(
            shard.name,
            block_keys(shard, pattern, score),
            block_masks(shard.mask, shard.shape, pattern),
            shard.offset // pattern.numel,
            shard.full_numel // pattern.numel,
        )
        for shard in shards
    ]
    threshold = prune_smallest_(few, num_pruned // pattern.numel, score=Given(), layout=layout)
    for shard, blocks in zip(shards, few, strict=True):
        _grid(shard.mask, shard.shape, pattern).copy_(blocks.mask.view(-1, 1, shard.shape[-1] // pattern.columns, 1))
    return threshold


def block_keys(shard: ParameterShard, pattern: Blocks, score: Score) -> Tensor:
    """Return each block's key, int32 [local blocks]: the bits of the sum of its scores.

    A score without numbers, such as a random order, gives a block the key of its first weight.
    """
    keys = torch.empty(shard.values.numel() // pattern.numel, dtype=torch.int32, device=shard.values.device)
    for weights, blocks in _row_chunks(shard, pattern):
        own = _grid(score(shard, weights), shard.shape, pattern)
        if not score.has_values:
            found = own[:, 0, :, 0]
        else:
            own, total = own.view(torch.float32), torch.zeros_like(own[:, 0, :, 0], dtype=torch.float32)
            # One weight after another: an order that no shape and no library decides.
            for row in range(pattern.rows):
                for column in range(pattern.columns):
                    total = total + own[:, row, :, column]
            found = total.view(torch.int32) & SIGN_OFF
        keys[blocks] = found.reshape(-1)
    return keys.masked_fill_(~block_masks(shard.mask, shard.shape, pattern), 0)


def block_masks(mask: Tensor, shape: Sequence[int], pattern: Blocks) -> Tensor:
    """Return which blocks have a kept weight, bool [local blocks]."""
    return _grid(mask, shape, pattern).any(dim=3).any(dim=1).reshape(-1)


def keep_whole_blocks_(shards: Sequence[ParameterShard], pattern: Blocks) -> None:
    """Keep all weights of each block that has a kept one, because a single weight of a dense block may be 0 by chance."""
    for shard in shards:
        blocks = block_masks(shard.mask, shard.shape, pattern)
        _grid(shard.mask, shard.shape, pattern).copy_(blocks.view(-1, 1, shard.shape[-1] // pattern.columns, 1))


def count_mixed_blocks(shards: Sequence[ParameterShard], pattern: Blocks, layout: RankLayout) -> int:
    """Count the blocks with both kept and pruned weights, over all shards.

    Collective: over the shard group.
    """
    counts = []
    for shard in shards:
        grid = _grid(shard.mask, shard.shape, pattern)
        is_mixed = grid.any(dim=3).any(dim=1) & ~grid.all(dim=3).all(dim=1)
        counts.append(torch.count_nonzero(is_mixed))
    return int(layout.sum_counts(torch.stack(counts).sum()))


def _grid(flat: Tensor, shape: Sequence[int], pattern: Blocks) -> Tensor:
    """View flat rows of a weight as [rows of blocks, rows, columns of blocks, columns]."""
    return flat.view(-1, pattern.rows, shape[-1] // pattern.columns, pattern.columns)


def _row_chunks(shard: ParameterShard, pattern: Blocks) -> Iterator[tuple[slice, slice]]:
    """Yield slices of a shard's weights, whole rows of blocks, and of its blocks."""
    size = pattern.rows * shard.shape[-1]
    per_chunk = max(1, next(iter(chunks(1 << 62, shard.values.device))).stop // size)
    for first in range(0, shard.values.numel() // size, per_chunk):
        last = min(first + per_chunk, shard.values.numel() // size)
        weights = slice(first * size, last * size)
        yield weights, slice(weights.start // pattern.numel, weights.stop // pattern.numel)
