"""Norms of a parameter's scores, bit for bit the same on any number of ranks, because they are sums of integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparsity.score import Score
from sparsity.shards import ParameterShard, RankLayout, chunks

BITS = 22
"""Scores are rounded to about 2^-22 of the parameter's largest score before they are squared and summed."""
HALF = 1 << BITS


def inverse_norms(
    shards: Sequence[ParameterShard], score: Score, normalize: str, layout: RankLayout
) -> dict[str, float]:
    """Return 1 / norm of each parameter's scores, with pruned weights as 0; 1 for a parameter of all zeros.

    Collective: over the shard group.

    Args:
        shards: This rank's shards of the parameters.
        score: A score whose keys are the bits of float32 numbers.
        normalize: "l2" (root of the sum of squares) or "rms" (root of the mean square over all weights).
        layout: The ranks that hold the other shards.
    """
    largest = torch.stack([_largest_key(shard, score) for shard in shards])
    if layout.shard_group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.shard_group)
    exponents = [math.frexp(top)[1] for top in largest.int().cpu().view(torch.float32).tolist()]
    sums = torch.stack(
        [_sum_of_squares(shard, score, exponent) for shard, exponent in zip(shards, exponents, strict=True)]
    )
    found = {}
    for shard, exponent, (high, low) in zip(shards, exponents, layout.sum_counts(sums).tolist(), strict=True):
        norm = math.ldexp(math.sqrt((high << BITS) + low), exponent - BITS)
        if normalize == "rms":
            norm /= math.sqrt(shard.full_numel)
        found[shard.name] = min(1 / norm, 2.0**127) if norm else 1.0
    return found


def _largest_key(shard: ParameterShard, score: Score) -> Tensor:
    """Return the key of the largest finite score, int64."""
    top = torch.zeros((), dtype=torch.int64, device=shard.values.device)
    for part in chunks(shard.values.numel(), shard.values.device):
        keys = score(shard, part)
        # Keys of 0x7F800000 and above are infinite or NaN.
        top = torch.maximum(top, torch.where(keys < 0x7F800000, keys, 0).max().long())
    return top


def _sum_of_squares(shard: ParameterShard, score: Score, exponent: int) -> Tensor:
    """Sum the squares of scores / 2^(exponent - BITS), rounded to integers: int64 [2], the high parts and the low BITS bits."""
    sums = torch.zeros(2, dtype=torch.int64, device=shard.values.device)
    for part in chunks(shard.values.numel(), shard.values.device):
        keys = score(shard, part)
        values = torch.where(keys < 0x7F800000, keys, 0).view(torch.float32).double()
        # torch.ldexp takes a tensor, and the host would wait while it is copied to a GPU.
        squares = (values * math.ldexp(1.0, BITS - exponent)).round().long().square()
        sums += torch.stack([(squares >> BITS).sum(), (squares & (HALF - 1)).sum()])
    return sums
