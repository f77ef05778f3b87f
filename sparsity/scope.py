"""Pools of weights that compete with each other to be kept. An event prunes a number of weights in each, by one threshold.

A pool is all prunable weights, one parameter, or a group named by patterns. A scope forms the pools and divides the weights
that an event prunes among them. This needs only the standard library, so that a plan and a run count in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, cast

from sparsity.arguments import check_number, check_patterns
from sparsity.mixed import Mixed
from sparsity.registry import Method, Registry
from sparsity.schedule import Ramp, Schedule


@dataclass(frozen=True)
class Group:
    """Parameters whose names match a pattern of `include` (`*` matches anything), and the sparsity they end with."""

    include: tuple[str, ...]
    sparsity: float

    def __post_init__(self) -> None:
        check_patterns("include", self.include)
        check_number("sparsity", self.sparsity, 0.8)
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"The group {', '.join(self.include)} has a target of {self.sparsity}, outside [0, 1): give the share of "
                "weights to remove, 0.8 for 80 %."
            )

    def matches(self, name: str) -> bool:
        """Return whether a pattern of `include` matches a name."""
        return any(fnmatchcase(name, pattern) for pattern in self.include)


@dataclass(frozen=True)
class Pool:
    """Parameters that share one threshold. They follow the schedule, but end at `sparsity` if it is not None."""

    names: tuple[str, ...]
    numel: int
    sparsity: float | None = None
    group: int = 0
    """The number of the pool's group: pools of one group share a target."""
    shape: tuple[int, ...] = ()
    """The shape of the parameter if the pool has only one."""

    def density(self, schedule: Schedule, step: int) -> float:
        """Return the share of the group's weights that the schedule keeps at a training step; step -1 is before the run."""
        return self.own(schedule).density(step) if step >= 0 else 1.0

    def own(self, schedule: Schedule) -> Schedule:
        """Return the schedule to this pool's own target."""
        if self.sparsity is None:
            return schedule
        assert isinstance(schedule, Ramp)
        return replace(schedule, sparsity=self.sparsity)


def num_pruned(numel: int, density: float) -> int:
    """Return how many weights a pool has lost at a density: round((1 - density) x numel)."""
    return round((1.0 - density) * numel)


class Scope(Method):
    """The rule that says which weights compete. A subclass divides parameters into pools in `split`."""

    compares_parameters: bool = True
    """True if weights of different parameters compete; only then do factors and norms have an effect."""
    is_even: bool = True
    """True if every layer can end at its group's sparsity, as a pattern requires."""
    is_by_row: bool = False
    """True if a weight competes only with those of its own row, the inputs of one neuron."""

    def split(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Divide the parameters `names` of a group into pools; return the names of each pool."""
        raise NotImplementedError

    def allocate(self, pools: Sequence[Pool], densities: Sequence[float], before: Sequence[int]) -> list[int]:
        """Return how many weights each pool has lost after an event.

        Args:
            pools: All pools.
            densities: The density of each pool's group after the event.
            before: The number of weights that each pool had lost before the event.
        """
        return [num_pruned(pool.numel, density) for pool, density in zip(pools, densities, strict=True)]

    def counts(self, pools: Sequence[Pool], schedule: Schedule, step: int) -> list[int]:
        """Return how many weights each pool has lost at a training step; step -1 is before the run."""
        return self.allocate(pools, [pool.density(schedule, step) for pool in pools], [0] * len(pools))


class Global(Scope):
    """One threshold for all weights, or for each group: layers end at different densities."""

    name = "global"
    label = "one threshold for all"

    def split(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Return one pool of all parameters."""
        return [tuple(names)]


class Uniform(Scope):
    """A threshold for each parameter: every layer ends at its target."""

    name = "uniform"
    label = "every layer to its target"
    compares_parameters = False

    def split(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Return a pool for each parameter."""
        return [(name,) for name in names]


class Row(Uniform):
    """A threshold for each row, the inputs of one neuron: every neuron loses the same number of weights.

    Each row of n inputs loses round((1 - density) n). This is the comparison group of Wanda (arXiv 2306.11695).
    """

    name = "row"
    label = "every neuron to its target"
    is_by_row = True

    def allocate(self, pools: Sequence[Pool], densities: Sequence[float], before: Sequence[int]) -> list[int]:
        """Return counts that are the same in each row of a parameter."""
        return [
            pool.numel // pool.shape[-1] * num_pruned(pool.shape[-1], density)
            for pool, density in zip(pools, densities, strict=True)
        ]


class Erk(Uniform):
    """A threshold for each parameter, small ones kept denser: densities in proportion to (inputs + outputs) / weights.

    Erdos-Renyi-Kernel (Evci et al. 2020, arXiv 1911.11134), with densities of at most 1. The counts of a group add up to
    exactly the number that the schedule prunes in it, and no count falls from one event to the next.
    """

    name = "erk"
    label = "every layer to a target by its shape (Erdos-Renyi-Kernel)"
    is_even = False

    def allocate(self, pools: Sequence[Pool], densities: Sequence[float], before: Sequence[int]) -> list[int]:
        """Return counts by `erk_counts`, which depend on those before the event."""
        counts = [0] * len(pools)
        for group in dict.fromkeys(pool.group for pool in pools):
            members = [number for number, pool in enumerate(pools) if pool.group == group]
            own = erk_counts(
                [pools[number].shape for number in members],
                densities[members[0]],
                [before[number] for number in members],
            )
            for number, count in zip(members, own, strict=True):
                counts[number] = count
        return counts

    def counts(self, pools: Sequence[Pool], schedule: Schedule, step: int) -> list[int]:
        """Return the counts after all events up to `step`, each rounded on top of the one before."""
        done, hashable = [event for event in schedule.events() if event <= step], cast(Hashable, schedule)
        return list(_erk_table(self, tuple(pools), hashable)[done[-1]]) if done else [0] * len(pools)


@lru_cache(maxsize=4)
def _erk_table(scope: Erk, pools: tuple[Pool, ...], schedule: Any) -> dict[int, list[int]]:
    counts, table = [0] * len(pools), {}
    for event in schedule.events():
        counts = scope.allocate(pools, [pool.density(schedule, event) for pool in pools], counts)
        table[event] = counts
    return table


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Return each parameter's density by Erdos-Renyi-Kernel, so that all of them together have `density`.

    Args:
        shapes: [out, in], or [expert, out, in]; the formula then uses the shape of one expert's matrix.
        density: The share of all weights that is kept.
    """
    numels = [math.prod(shape) for shape in shapes]
    raw = [sum(shape[-2:]) / math.prod(shape[-2:]) for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        left = [number for number in range(len(shapes)) if number not in dense]
        budget = density * sum(numels) - sum(numels[number] for number in dense)
        scale = budget / math.fsum(raw[number] * numels[number] for number in left)
        full = {number for number in left if raw[number] * scale > 1}
        if not full:
            return [1.0 if number in dense else raw[number] * scale for number in range(len(shapes))]
        dense |= full
    return [1.0] * len(shapes)


def erk_counts(shapes: Sequence[tuple[int, ...]], density: float, before: Sequence[int]) -> list[int]:
    """Return how many weights of each parameter are pruned: `erk_densities` rounded so that the sum is exact.

    Each parameter first loses the integer part of the weights that it has left to lose. The parameters with the largest
    remainders then lose one more, until the sum is round((1 - density) x number of weights).

    Args:
        shapes: The parameters' shapes, as for `erk_densities`.
        density: The share of all weights that is kept.
        before: The number of weights that each parameter has lost already; no result is lower.
    """
    numels = [math.prod(shape) for shape in shapes]
    more = num_pruned(sum(numels), density) - sum(before)
    wanted = [(1 - own) * numel for own, numel in zip(erk_densities(shapes, density), numels, strict=True)]
    lacks = [max(0.0, want - had) for want, had in zip(wanted, before, strict=True)]
    gains = [math.floor(lack) for lack in lacks]
    order = sorted(range(len(shapes)), key=lambda number: (gains[number] - lacks[number], number))
    for number in order:
        if sum(gains) < more and before[number] + gains[number] < numels[number]:
            gains[number] += 1
    for number in reversed(order):
        gains[number] -= min(gains[number], max(0, sum(gains) - more))
    return [had + gain for had, gain in zip(before, gains, strict=True)]


SCOPES: Registry[Scope] = Registry("scope", {scope.name: scope for scope in (Global(), Uniform(), Erk(), Row())}, Scope)


def make_pools(
    shapes: Mapping[str, Sequence[int]], scope: str | Scope = "global", groups: Sequence[Group] = ()
) -> list[Pool]:
    """Return the pools of prunable parameters; each parameter is in exactly one.

    Args:
        shapes: The parameters' shapes by name.
        scope: The scope that divides each group, and the parameters in no group, into pools.
        groups: Parameters with their own targets.

    Raises:
        ValueError: A pattern matches no prunable parameter, or a parameter is in two groups.
    """
    scope = SCOPES.find(scope)
    _check_groups(shapes, groups)
    owners = {name: next((group for group in groups if group.matches(name)), None) for name in shapes}
    pools = []
    for number, group in enumerate((*groups, None)):
        names = tuple(name for name, owner in owners.items() if owner is group)
        sparsity = None if group is None else group.sparsity
        for members in scope.split(names) if names else ():
            numel = sum(math.prod(shapes[name]) for name in members)
            shape = tuple(shapes[members[0]]) if len(members) == 1 else ()
            pools.append(Pool(members, numel, sparsity, number, shape))
    return pools


def target_shares(pools: Sequence[Pool], sparsity: float) -> tuple[tuple[float, float], ...]:
    """Return (share of all weights, final sparsity) of each target; pools without their own target end at `sparsity`."""
    numels: dict[float, int] = {}
    for pool in pools:
        target = sparsity if pool.sparsity is None else pool.sparsity
        numels[target] = numels.get(target, 0) + pool.numel
    total = sum(numels.values())
    return tuple((numel / total, target) for target, numel in numels.items())


def seen_together(schedule: Ramp, pools: Sequence[Pool]) -> Ramp | Mixed:
    """Return the schedule of all pools together: `schedule` itself if all end at its sparsity."""
    shares = target_shares(pools, schedule.sparsity)
    return schedule if {sparsity for _, sparsity in shares} <= {schedule.sparsity} else Mixed(schedule, shares)


def _check_groups(names: Mapping[str, object], groups: Sequence[Group]) -> None:
    for group in groups:
        for pattern in group.include:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"The pattern {pattern!r} in groups matches no prunable parameter: patterns are compared with names "
                    f"like {next(iter(names), '')!r}, * matches anything."
                )
    for name in names:
        claims = [group for group in groups if group.matches(name)]
        if len(claims) > 1:
            raise ValueError(
                f"{name} is in two groups, {', '.join(claims[0].include)} and {', '.join(claims[1].include)}: let one of "
                "them alone match it."
            )
