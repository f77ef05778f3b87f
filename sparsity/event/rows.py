"""Pruning row by row: the weights of one neuron compete, and every neuron loses the same number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sparsity.score import Score
from sparsity.shards import ParameterShard, RankLayout, chunks


@torch.no_grad()
def prune_rows_(
    shards: Sequence[ParameterShard], num_pruned: int, *, score: Score, layout: RankLayout | None = None
) -> int:
    """Set the masks so that each row has lost the same number of weights, those with the smallest keys.

    Weights that are pruned already go first, and of equal keys the lower index. FSDP2 shards whole rows, so no rank needs
    weights of another.

    Collective: over the shard group.

    Args:
        shards: This rank's shard of the one parameter of a pool, [out, in] or [expert, out, in].
        num_pruned: How many weights of the full parameter are pruned afterwards, a multiple of its rows.
        score: The score that ranks weights.
        layout: Which ranks hold the other rows; None: this rank holds all.

    Returns:
        The largest key that is pruned.

    Raises:
        ValueError: A row has lost more weights already.
    """
    (shard,) = shards
    layout, columns, device = layout or RankLayout(), shard.shape[-1], shard.values.device
    num_gone = num_pruned * columns // shard.full_numel
    assert num_gone * (shard.full_numel // columns) == num_pruned, "the scope asks for whole rows"
    num_rows = shard.values.numel() // columns
    masks = shard.mask.view(num_rows, columns)
    overfull = torch.count_nonzero((~masks).sum(dim=1) > num_gone)
    if num_overfull := layout.sum_ints([int(overfull)], device)[0]:
        raise ValueError(
            f"{num_overfull:,} rows of {shard.name} have more than {num_gone} of {columns} weights pruned already, so "
            "scope=row cannot give each the same number: start from a dense model, or take scope=uniform."
        )
    top = torch.zeros(1, dtype=torch.int64, device=device)
    per_chunk = max(1, next(iter(chunks(1 << 62, device))).stop // columns)
    for first in range(0, num_rows if num_gone else 0, per_chunk):
        last = min(first + per_chunk, num_rows)
        keys = score(shard, slice(first * columns, last * columns)).view(-1, columns)
        keys = keys.masked_fill(~masks[first:last], -1)
        order = torch.argsort(keys, dim=1, stable=True)[:, :num_gone]
        masks[first:last].scatter_(1, order, False)
        top = torch.maximum(top, keys.gather(1, order[:, -1:]).max().long())
    if layout.shard_group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=layout.shard_group)
    return int(top)
