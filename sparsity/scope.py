"""Which weights compete with each other: pools, each with one threshold and a target of its own.

A pool is all prunable weights (global), one layer (uniform), or a group named by patterns; how many weights of it are
pruned at a density follows from its size alone. Nothing but the standard library is needed here, so that a plan and a
run count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from sparsity.schedule import Mixed, Ramp, Schedule

ScopeName = Literal["global", "uniform"]


@dataclass(frozen=True)
class Group:
    """The parameters whose name matches a pattern of `include` (`*` matches anything), and the sparsity they end with."""

    include: tuple[str, ...]
    sparsity: float

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.include)


@dataclass(frozen=True)
class Pool:
    """Parameters that share one threshold. They follow the schedule, to `sparsity` where it is not None."""

    names: tuple[str, ...]
    numel: int
    sparsity: float | None = None

    def num_pruned(self, schedule: Schedule, step: int) -> int:
        """How many of its weights are pruned while `step` trains; step -1 is before the run."""
        return num_pruned(self.numel, self._own(schedule).density(step)) if step >= 0 else 0

    def final_sparsity(self, schedule: Ramp) -> float:
        return schedule.sparsity if self.sparsity is None else self.sparsity

    def _own(self, schedule: Schedule) -> Schedule:
        if self.sparsity is None:
            return schedule
        assert isinstance(schedule, Ramp)
        return replace(schedule, sparsity=self.sparsity)


def num_pruned(numel: int, density: float) -> int:
    """round((1 - density) x numel): the number of weights that a pool has lost at a density."""
    return round((1.0 - density) * numel)


def make_pools(sizes: Mapping[str, int], scope: ScopeName = "global", groups: Sequence[Group] = ()) -> list[Pool]:
    """The pools of prunable parameters, given as {name: number of weights}; each parameter is in exactly one.

    `global` makes one pool of each group and one of the rest, `uniform` one of each parameter. A ValueError names a
    pattern that matches no prunable parameter, and a parameter that two groups claim.
    """
    if scope not in get_args(ScopeName):
        raise ValueError(f"scope={scope} is not known: choose {' or '.join(get_args(ScopeName))}.")
    _check_groups(sizes, groups)
    owners = {name: next((group for group in groups if group.matches(name)), None) for name in sizes}
    pools = []
    for group in (*groups, None):
        names = tuple(name for name, owner in owners.items() if owner is group)
        sparsity = None if group is None else group.sparsity
        for members in [names] if scope == "global" else [(name,) for name in names]:
            if members:
                pools.append(Pool(members, sum(sizes[name] for name in members), sparsity))
    return pools


def target_shares(pools: Sequence[Pool], sparsity: float) -> tuple[tuple[float, float], ...]:
    """(share of all weights, final sparsity) of each different target; `sparsity` is that of pools without their own."""
    numels: dict[float, int] = {}
    for pool in pools:
        target = sparsity if pool.sparsity is None else pool.sparsity
        numels[target] = numels.get(target, 0) + pool.numel
    total = sum(numels.values())
    return tuple((numel / total, target) for target, numel in numels.items())


def seen_together(schedule: Ramp, pools: Sequence[Pool]) -> Ramp | Mixed:
    """The schedule of all pools' weights taken together: `schedule` itself where all end with its own sparsity."""
    shares = target_shares(pools, schedule.sparsity)
    return schedule if {sparsity for _, sparsity in shares} <= {schedule.sparsity} else Mixed(schedule, shares)


def _check_groups(sizes: Mapping[str, int], groups: Sequence[Group]) -> None:
    for group in groups:
        if not 0 <= group.sparsity < 1:
            raise ValueError(
                f"The group {', '.join(group.include)} has a target of {group.sparsity}, outside [0, 1): give the share of "
                "weights to remove."
            )
        for pattern in group.include:
            if not any(fnmatchcase(name, pattern) for name in sizes):
                raise ValueError(
                    f"The pattern {pattern!r} in groups matches no prunable parameter: patterns are compared with names "
                    f"like {next(iter(sizes), '')!r}, * matches anything."
                )
    for name in sizes:
        claims = [group for group in groups if group.matches(name)]
        if len(claims) > 1:
            raise ValueError(
                f"{name} is in two groups, {', '.join(claims[0].include)} and {', '.join(claims[1].include)}: let one of "
                "them alone match it."
            )
