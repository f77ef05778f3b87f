"""A move of the masks: some kept weights are dropped, and the same number of pruned weights grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsity.mask import count_mask
from sparsity.score import Magnitude, Score
from sparsity.select import prune_smallest_
from sparsity.shards import ParameterShard, RankLayout


@torch.no_grad()
def move_(
    shards: Sequence[ParameterShard],
    num_moved: int,
    *,
    drop_by: Score,
    grow_by: Score,
    gradients: Mapping[str, Tensor] | None = None,
    layout: RankLayout | None = None,
) -> None:
    """Drop the `num_moved` kept weights with the smallest keys, then grow the same number of pruned ones, largest first.

    A weight that was just dropped may grow again; it then keeps its value. Only the masks change; the caller zeroes the
    weights that stay dropped.

    Collective: over the shard group.

    Args:
        shards: The shards of one pool.
        num_moved: The number of weights to move, at most the number of kept ones.
        drop_by: The score of the kept weights.
        grow_by: The score of the pruned ones: `Magnitude` of the gradients, or a random order.
        gradients: The dense gradient of each shard by name, for scores that read values.
        layout: The ranks that hold the other shards; None if this rank holds all of them.
    """
    layout = layout or RankLayout()
    if not num_moved:
        return
    numel = sum(shard.full_numel for shard in shards)
    kept = int(layout.sum_counts(count_mask(shards)).sum())
    prune_smallest_(shards, numel - kept + num_moved, score=drop_by, layout=layout)
    # Select in reverse: the candidates are the pruned weights, and those that selection keeps are the ones that grow.
    candidates = [replace(shard, values=_growth_values(shard, gradients), mask=~shard.mask) for shard in shards]
    prune_smallest_(candidates, numel - num_moved, score=grow_by, layout=layout)
    for shard, grown in zip(shards, candidates, strict=True):
        shard.mask.logical_or_(grown.mask)


def _growth_values(shard: ParameterShard, gradients: Mapping[str, Tensor] | None) -> Tensor:
    """Return the candidates' values to compare, and 0 for other weights; NaN becomes 0, so that such a weight never grows."""
    if gradients is None:
        return shard.values
    return gradients[shard.name].nan_to_num(nan=0.0).masked_fill_(shard.mask, 0.0)


GRADIENT = Magnitude()
"""The score for growth by gradients: candidates hold the gradient as their values."""
