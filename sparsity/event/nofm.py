"""N:M patterns: only the M - N smallest weights of each block of M consecutive weights may be pruned.

A block is always on one rank, because FSDP2 shards whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsity.pattern import NofM
from sparsity.score import Given, Score
from sparsity.select import Threshold, prune_smallest_
from sparsity.shards import ParameterShard, RankLayout, chunks


@torch.no_grad()
def prune_nofm_(
    shards: Sequence[ParameterShard],
    num_pruned: int,
    *,
    pattern: NofM,
    score: Score,
    layout: RankLayout | None = None,
) -> Threshold | None:
    """Set the masks so that exactly `num_pruned` weights of all shards are pruned, the smallest of the `candidates`.

    No block ever loses more weights than its candidates, and the pattern is complete when all candidates are pruned. During
    the call, memory holds the candidates twice.

    Collective: over the shard group.

    Args:
        shards: This rank's shards of the parameters in the pool.
        num_pruned: The number of weights of the full parameters that are pruned afterwards.
        pattern: The pattern.
        score: The score that ranks weights.
        layout: The ranks that hold the other shards; None if this rank holds all of them.

    Raises:
        ValueError: `num_pruned` is more than the pattern allows.
    """
    most = sum(pattern.num_candidates(shard.full_numel) for shard in shards)
    if num_pruned > most:
        raise ValueError(f"pattern={pattern} lets {most:,} weights go, not {num_pruned:,}: prune less.")
    allowed = [candidates(shard, pattern, score) for shard in shards]
    # A score that depends on positions must compute its keys before the candidates are taken out of their tensor.
    ranked = [shard.values if score.is_placeless else score(shard, slice(0, len(shard.values))) for shard in shards]
    compact = [
        ParameterShard(
            shard.name,
            take_candidates(values, chosen, pattern),
            take_candidates(shard.mask, chosen, pattern),
            # Every block has the same number of candidates, so positions among them do not depend on the world size.
            pattern.num_candidates(shard.offset),
            pattern.num_candidates(shard.full_numel),
        )
        for shard, values, chosen in zip(shards, ranked, allowed, strict=True)
    ]
    threshold = prune_smallest_(compact, num_pruned, score=score if score.is_placeless else Given(), layout=layout)
    for shard, chosen, few in zip(shards, allowed, compact, strict=True):
        shard.mask.masked_scatter_(chosen, few.mask)
    return threshold


def candidates(shard: ParameterShard, pattern: NofM, score: Score) -> Tensor:
    """Mark the M - N smallest keys of each block of M weights, bool [local numel]; of equal keys, those with the lower index.

    Weights that are already pruned are marked first, even before survivors that are 0.
    """
    chosen = torch.zeros_like(shard.mask)
    for part in chunks(shard.values.numel() // pattern.block, shard.values.device):
        weights = slice(part.start * pattern.block, part.stop * pattern.block)
        keys = score(shard, weights).masked_fill(~shard.mask[weights], -1).view(-1, pattern.block)
        smallest = torch.argsort(keys, dim=1, stable=True)[:, : pattern.block - pattern.kept]
        chosen[weights].view(keys.shape).scatter_(1, smallest, True)
    return chosen


def take_candidates(values: Tensor, chosen: Tensor, pattern: NofM) -> Tensor:
    """Return `values[chosen]`, on a GPU without waiting for the device, as indexing would."""
    return values[chosen] if values.device.type == "cpu" else _take_by_block(values, chosen, pattern)


def _take_by_block(values: Tensor, chosen: Tensor, pattern: NofM) -> Tensor:
    num_blocks, num_taken = values.numel() // pattern.block, pattern.block - pattern.kept
    taken = values.new_empty((num_blocks, num_taken))
    for part in chunks(num_blocks, values.device):
        rows = chosen.view(-1, pattern.block)[part]
        places = torch.argsort((~rows).byte(), dim=1, stable=True)[:, :num_taken]
        taken[part] = values.view(-1, pattern.block)[part].gather(1, places)
    return taken.view(-1)


def count_overfull_blocks(shards: Sequence[ParameterShard], pattern: NofM, layout: RankLayout) -> int:
    """Count the blocks that have lost more than M - N weights, over all shards.

    Collective: over the shard group.
    """
    counts = [
        torch.count_nonzero((~shard.mask).view(-1, pattern.block).sum(dim=1) > pattern.block - pattern.kept)
        for shard in shards
    ]
    return int(layout.sum_counts(torch.stack(counts).sum()))
