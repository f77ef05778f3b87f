"""One prune event on one pool: the weights with the smallest keys are pruned, within the pattern if there is one, or by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsity.event.blocks import count_mixed_blocks, prune_blocks_
from sparsity.event.nofm import count_overfull_blocks, prune_nofm_
from sparsity.event.rows import prune_rows_
from sparsity.pattern import Blocks, Pattern
from sparsity.score import Score, magnitude
from sparsity.select import prune_smallest_
from sparsity.shards import ParameterShard, RankLayout


@torch.no_grad()
def prune_pool_(
    shards: Sequence[ParameterShard],
    num_pruned: int,
    *,
    pattern: Pattern | None = None,
    by_row: bool = False,
    score: Score = magnitude,
    layout: RankLayout | None = None,
) -> int | None:
    """Set the masks so that exactly `num_pruned` weights of all shards are pruned.

    Weights that are pruned already stay pruned. See `prune_smallest_`, `prune_nofm_`, `prune_blocks_` and `prune_rows_` for
    the order in which the others go.

    Collective: over the shard group.

    Args:
        shards: This rank's shards of the parameters in the pool.
        num_pruned: The number of weights of the full parameters that are pruned afterwards.
        pattern: N:M or blocks; None if weights may be pruned anywhere.
        by_row: Whether to prune the same number of weights in each row, see `sparsity.event.rows`.
        score: The score that ranks weights.
        layout: The ranks that hold the other shards; None if this rank holds all of them.

    Returns:
        The largest key that is pruned, or None if nothing is to be pruned.

    Raises:
        ValueError: `num_pruned` is more than the pattern allows, or more than the pool has.
    """
    if by_row:
        return prune_rows_(shards, num_pruned, score=score, layout=layout)
    if isinstance(pattern, Blocks):
        threshold = prune_blocks_(shards, num_pruned, pattern=pattern, score=score, layout=layout)
    elif pattern is not None:
        threshold = prune_nofm_(shards, num_pruned, pattern=pattern, score=score, layout=layout)
    else:
        threshold = prune_smallest_(shards, num_pruned, score=score, layout=layout)
    return None if threshold is None else threshold.key


def check_blocks(shards: Sequence[ParameterShard], pattern: Pattern | None, layout: RankLayout) -> None:
    """Raise a ValueError if blocks of the pattern have lost more weights than it allows.

    Collective: over the shard group.
    """
    if isinstance(pattern, Blocks):
        if mixed := count_mixed_blocks(shards, pattern, layout):
            raise ValueError(
                f"{mixed:,} blocks of {pattern} have both kept and pruned weights: start from a dense model or one of this "
                "pattern, or take pattern=unstructured."
            )
    elif pattern is not None and (overfull := count_overfull_blocks(shards, pattern, layout)):
        raise ValueError(
            f"{overfull:,} blocks of {pattern.block} weights have more than {pattern.block - pattern.kept} zeros, so "
            f"pattern={pattern} cannot end at its sparsity: start from a dense model or one of this pattern, or use "
            "pattern=unstructured."
        )
