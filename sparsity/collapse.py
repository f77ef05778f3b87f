"""Parameters that magnitude would remove whole, because every one of their weights is 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsity.shards import ParameterShard, RankLayout


def all_zero_names(shards: Sequence[ParameterShard], layout: RankLayout) -> list[str]:
    """Return the parameters without a single weight other than 0. Collective: over the shard group."""
    if not shards:
        return []
    counts = layout.sum_counts(torch.stack([torch.count_nonzero(shard.values) for shard in shards])).tolist()
    return [shard.name for shard, count in zip(shards, counts, strict=True) if shard.full_numel and not count]


def refuse_all_zero(names: Sequence[str], when: str) -> None:
    """Raise a ValueError that names the first of `names`, if there is one."""
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        example = "*lora_B*" if "lora_B" in names[0] else names[0]
        raise ValueError(
            f"{names[0]}{more} is all zeros {when}, so its weights would be pruned before all others and it could learn "
            f"nothing: name it in requires_dense, such as requires_dense=[{example!r}], or initialize it with other values."
        )
