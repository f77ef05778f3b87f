"""Masks out of a checkpoint that holds only weights: its zeros, told apart by what the callback left in the Trainer's
state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from sparsity.mask import masks_from_zeros
from sparsity.shards import ParameterShard, RankLayout

STATE_KEY = "sparsity"
"""Where trainer_state.json has it: `stateful_callbacks`, under a name that is no callback's class."""
MAX_LISTED = 1 << 20


def surviving_zeros(shards: Sequence[ParameterShard], layout: RankLayout) -> dict[str, list[int]] | None:
    """Flat indices in the full tensors of kept weights that are exactly 0 by chance: nearly always none.

    None where they are more than `MAX_LISTED`, too many to be listed. Collective over the shard group.
    """
    local = [torch.nonzero((shard.values == 0) & shard.mask).view(-1) + shard.offset for shard in shards]
    count = layout.sum_counts(torch.tensor([sum(map(len, local))], device=shards[0].mask.device))
    if not 0 < int(count) <= MAX_LISTED:
        return None if count else {}
    mine = {shard.name: found.tolist() for shard, found in zip(shards, local, strict=True) if len(found)}
    by_rank = [mine]
    if layout.shard_group is not None:
        by_rank = [{} for _ in range(dist.get_world_size(layout.shard_group))]
        # Between the processes of one run, so unpickling is safe.
        dist.all_gather_object(by_rank, mine, group=layout.shard_group)
    return {shard.name: sorted(i for one in by_rank for i in one.get(shard.name, ())) for shard in shards}


def masks_from_weights(shards: Sequence[ParameterShard], surviving: Mapping[str, Sequence[int]]) -> None:
    """What is exactly 0 is pruned, but for the `surviving` flat indices of each parameter."""
    masks_from_zeros(shards)
    for shard in shards:
        indices = (
            torch.tensor(surviving.get(shard.name, ()), dtype=torch.int64, device=shard.mask.device) - shard.offset
        )
        shard.mask[indices[(indices >= 0) & (indices < len(shard.mask))]] = True
