"""Checks for parameters of all zeros, which magnitude pruning would remove entirely."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sparsity.shards import ParameterShard, RankLayout, chunks, to_device

FIRST = 1 << 10
"""The number of weights of a shard that are read first; almost always at least one of them is not 0."""


def all_zero_names(shards: Sequence[ParameterShard], layout: RankLayout) -> list[str]:
    """Return the names of the parameters whose weights are all 0.

    Collective: over the shard group.
    """
    if not shards:
        return []
    suspects = _without_nonzero(shards, _count_nonzero_first(shards), layout)
    if not suspects:
        return []
    counts = torch.stack([_count_nonzero(shard.values) for shard in suspects])
    return [shard.name for shard in _without_nonzero(suspects, counts, layout)]


def _without_nonzero(shards: Sequence[ParameterShard], counts: Tensor, layout: RankLayout) -> list[ParameterShard]:
    """Return the shards whose counts are 0 on all ranks. Collective: over the shard group."""
    totals = layout.sum_counts(counts).tolist()
    return [shard for shard, total in zip(shards, totals, strict=True) if shard.full_numel and not total]


def _count_nonzero_first(shards: Sequence[ParameterShard]) -> Tensor:
    """Count the nonzero weights among the first of each shard, int64 [shards]."""
    first = [shard.values[:FIRST] for shard in shards]
    ends = list(accumulate((len(few) for few in first), initial=0))
    upto = torch.zeros(ends[-1] + 1, dtype=torch.int64, device=first[0].device)
    torch.cumsum(torch.cat(first) != 0, dim=0, out=upto[1:])
    return upto.take(to_device(ends, upto.device)).diff()


def _count_nonzero(values: Tensor) -> Tensor:
    """Apply `torch.count_nonzero` in pieces, because on a GPU it needs 9 bytes for each weight."""
    counts = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in chunks(values.numel(), values.device):
        counts += torch.count_nonzero(values[part])
    return counts


def refuse_all_zero(names: Sequence[str], when: str) -> None:
    """Raise a ValueError that names the first of `names`, if there is any."""
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        example = "*lora_B*" if "lora_B" in names[0] else names[0]
        raise ValueError(
            f"{names[0]}{more} is all zeros {when}, so its weights would be pruned before all others and it could learn "
            f"nothing: name it in requires_dense, such as requires_dense=[{example!r}], or initialize it with other values."
        )
