"""Masks of a resumed run: saving, restoring and checking them.

`python -m train` saves masks with the weights, and `check_masks` verifies them. A plain Trainer's checkpoint holds only
weights. For it, `state_for_trainer` records in trainer_state.json which weights are 0 by chance and not pruned, and
`restore_from_weights` rebuilds the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sparsity.mask import count_nonzero_pruned, masks_from_zeros
from sparsity.pruner import Pruner
from sparsity.scope import Pool
from sparsity.shards import ParameterShard, RankLayout

STATE_KEY = "sparsity"
"""The key of this state in trainer_state.json, under `stateful_callbacks`. No callback's class has this name."""
MAX_LISTED = 1 << 20


def mask_state(pruner: Pruner) -> dict[str, Any]:
    """Return the state to save besides the masks of `pruner.shards`: plain numbers, the same on every rank."""
    return {"threshold": pruner.threshold, "inherited": dict(pruner.inherited), "kept": dict(pruner.kept)}


def check_masks(pruner: Pruner, state: Mapping[str, Any], global_step: int) -> None:
    """Check the masks that were loaded into `pruner.shards`, and take over the saved state before step `global_step`.

    Collective: over the shard group.

    Args:
        pruner: The pruner, bound to the model, with the saved masks in its shards.
        state: The result of `mask_state` when the masks were saved.
        global_step: The next step to train.

    Raises:
        ValueError: The masks do not have the saved counts, a masked weight is not 0, or the number of pruned weights is
            not the larger of the schedule's and that of inherited zeros.
    """
    kept, inherited = state["kept"], state["inherited"]
    pruner.recount()
    scheduled_before = pruner.scheduled(global_step - 1)
    # Before the first event nothing is masked, and another choice of parameters does no harm.
    has_masks = any(scheduled_before) or any(inherited.values())
    for name in dict.fromkeys([*pruner.kept, *(kept if has_masks else ())]):
        found, saved = pruner.kept.get(name), kept.get(name)
        if found != saved:
            raise ValueError(
                f"The mask of {name} keeps {found} weights, but the checkpoint counted {saved}: it lost its masks, "
                "belongs to another model, or the Trainer could not load it (then its log names missing keys); resume "
                "from another checkpoint."
            )
    alive = count_nonzero_pruned(pruner.shards, pruner.layout)
    if alive:
        raise ValueError(
            f"The checkpoint has {alive:,} weights that its masks prune but that are not 0: it is damaged or was "
            "edited; resume from another checkpoint."
        )
    for pool, count in zip(pruner.pools, scheduled_before, strict=True):
        scheduled = max(count, sum(inherited.get(name, 0) for name in pool.names))
        if pruner.num_pruned(pool) != scheduled:
            raise ValueError(
                f"The checkpoint has {pruner.num_pruned(pool):,} pruned weights{_where(pool, pruner)}, but the schedule "
                f"prunes {scheduled:,} before step {global_step}: it belongs to another schedule; resume from another "
                "checkpoint."
            )
    pruner.check_blocks()
    pruner.inherited = dict(inherited)
    pruner.threshold = state["threshold"]


def check_zeros(pruner: Pruner, global_step: int, *, allow_more: bool) -> None:
    """Rebuild the masks before step `global_step` from zeros.

    Collective: over the shard group.

    Args:
        pruner: The pruner, bound to the model.
        global_step: The next step to train.
        allow_more: Accept more zeros than the schedule has pruned by then.

    Raises:
        ValueError: The number of zeros is not the schedule's.
    """
    counts = pruner.scheduled(global_step - 1)
    if sum(counts) or allow_more:
        pruner.take_masks_from_zeros()
    for pool, count in zip(pruner.pools, counts, strict=True):
        found = pruner.num_pruned(pool)
        if found < count or (found > count and not allow_more):
            raise ValueError(
                f"The checkpoint has {found:,} zero weights{_where(pool, pruner)}, but {count:,} are pruned after step "
                f"{global_step - 1}: it does not belong to this run, lost its masks, or kept a weight of exactly 0; "
                "resume from another one."
            )


def state_for_trainer(pruner: Pruner, step: int) -> dict[str, Any]:
    """Return the state that tells pruned weights from other zeros in a checkpoint that holds only weights.

    Collective: over the shard group.
    """
    pruner.refresh()
    surviving = surviving_zeros(pruner.shards, pruner.layout) if pruner.density < 1 else {}
    return {**mask_state(pruner), "step": step, "surviving_zeros": surviving}


def restore_from_weights(pruner: Pruner, saved: Mapping[str, Any], global_step: int) -> None:
    """Rebuild and check the masks from a checkpoint's zeros and the result of `state_for_trainer` at that step.

    Collective: over the shard group.

    Raises:
        ValueError: The masks do not fit, see `check_masks`.
    """
    if sum(saved["kept"].values()) < pruner.num_prunable:
        masks_from_weights(pruner.shards, saved["surviving_zeros"] or {})
    check_masks(pruner, saved, global_step)


def surviving_zeros(shards: Sequence[ParameterShard], layout: RankLayout) -> dict[str, list[int]] | None:
    """Return, by parameter, the flat indices in the full tensors of kept weights that are exactly 0 by chance.

    There are almost never any. If there are more than `MAX_LISTED`, the result is None.

    Collective: over the shard group.
    """
    local = [torch.nonzero((shard.values == 0) & shard.mask).view(-1) + shard.offset for shard in shards]
    count = layout.sum_counts(torch.tensor([sum(map(len, local))], device=shards[0].mask.device))
    if not 0 < int(count) <= MAX_LISTED:
        return None if count else {}
    mine = {shard.name: found.tolist() for shard, found in zip(shards, local, strict=True) if len(found)}
    by_rank = [mine]
    if layout.shard_group is not None:
        by_rank = [{} for _ in range(dist.get_world_size(layout.shard_group))]
        # The objects come from processes of the same run, so unpickling them is safe.
        dist.all_gather_object(by_rank, mine, group=layout.shard_group)
    return {shard.name: sorted(i for one in by_rank for i in one.get(shard.name, ())) for shard in shards}


def masks_from_weights(shards: Sequence[ParameterShard], surviving: Mapping[str, Sequence[int]]) -> None:
    """Mark every exact 0 as pruned except the `surviving` flat indices of each parameter."""
    masks_from_zeros(shards)
    for shard in shards:
        indices = (
            torch.tensor(surviving.get(shard.name, ()), dtype=torch.int64, device=shard.mask.device) - shard.offset
        )
        shard.mask[indices[(indices >= 0) & (indices < len(shard.mask))]] = True


def _where(pool: Pool, pruner: Pruner) -> str:
    """Name the pool's weights for an error message."""
    if len(pruner.pools) == 1:
        return ""
    return f" in {pool.names[0]}" + (f" and {len(pool.names) - 1} others" if len(pool.names) > 1 else "")
