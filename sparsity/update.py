"""Updates: whether pruned weights may come back, when, and by what rule.

The schedule says how many weights are kept. An update says which of the others may return: none (`Shrink`, the default), some
at regular steps (`Set`, `Rigl`), any whenever masks are chosen (`Ste`), or all in dense phases (`AcDc`). Importing this needs
no torch; `sparsity.rules` applies an update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsity.arguments import check_number, check_whole
from sparsity.registry import Method, Registry
from sparsity.schedule import Alternating, Schedule

WEIGHT_GRADIENT_SHARE = 1 / 3
"""Share of a step's compute spent on weight gradients; the forward pass and input gradients take the rest."""


@dataclass(frozen=True)
class Update(Method):
    """The rule by which masks change in addition to the schedule's events."""

    lets_return = False
    """True if a pruned weight may come back."""
    gradients = "masked"
    """Weights whose gradients are used: the kept ones ("masked"), all at moves ("at moves"), or always all ("dense")."""
    state_bytes = 0
    """Bytes for each weight that are held and saved in addition to its mask."""
    move_bytes = 0
    """Bytes for each weight that a move by gradients needs: float32 gradients, a copy to compare, the candidates' mask."""

    def moves(self, schedule: Schedule, num_steps: int) -> frozenset[int]:
        """Return the steps of a run at which masks move in addition to the schedule's events."""
        return frozenset()

    def extra_compute(self, schedule: Schedule, num_steps: int) -> float:
        """Return the compute for gradients of pruned weights, in steps of the dense model.

        The sum of densities over the steps does not include it.
        """
        if self.gradients == "masked":
            return 0.0
        if self.gradients == "dense":
            return WEIGHT_GRADIENT_SHARE * num_steps * (1 - schedule.average_density(num_steps))
        return WEIGHT_GRADIENT_SHARE * math.fsum(1 - schedule.density(step) for step in self.moves(schedule, num_steps))

    def check(self, schedule: Schedule, pattern: object) -> None:
        """Raise a ValueError if the update cannot be combined with the schedule or the pattern (None: unstructured)."""
        if isinstance(schedule, Alternating):
            raise ValueError(
                f"schedule=alternating has dense phases, in which all weights return, and update={self.name} has none: take "
                "update=acdc."
            )


@dataclass(frozen=True)
class Shrink(Update):
    """Masks only shrink: a pruned weight never comes back."""

    name = "shrink"
    label = "a pruned weight never comes back"


@dataclass(frozen=True)
class Moving(Update):
    """Masks that move every `every_steps` steps until the share `end` of the run's steps is done."""

    lets_return = True

    share: float = 0.3
    """Share of the kept weights that is replaced at the first move; it falls to 0 by a cosine."""
    every_steps: int | None = None
    """Steps between moves; None: a fortieth of the run, at most 100."""
    end: float = 0.75

    def __post_init__(self) -> None:
        check_number("moves.share", self.share, 0.3)
        check_number("moves.end", self.end, 0.75)
        if self.every_steps is not None:
            check_whole("moves.every", self.every_steps, 100)
        if not 0 < self.share < 1:
            raise ValueError(
                f"moves.share={self.share} is outside (0, 1): give the share of the kept weights to replace, such as 0.3."
            )
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"moves.every={self.every_steps} must be at least 1 step.")
        if not 0 < self.end <= 1:
            raise ValueError(
                f"moves.end={self.end} is outside (0, 1]: give the share of the run's steps after which masks stay."
            )

    def moves(self, schedule: Schedule, num_steps: int) -> frozenset[int]:
        """Return every `every_steps`-th step after the first event until the share `end` of the run is done."""
        first = min(schedule.events(), default=num_steps)
        last = min(num_steps, math.ceil(self.end * num_steps))
        every = self.every_steps or max(1, min(100, num_steps // 40))
        return frozenset(step for step in range(0, last, every) if step > first)

    def share_at(self, step: int, num_steps: int) -> float:
        """Return the share of the kept weights to replace at a step: share / 2 (1 + cos(pi step / end))."""
        return self.share / 2 * (1 + math.cos(math.pi * step / (self.end * num_steps)))

    def check(self, schedule: Schedule, pattern: object) -> None:
        """Raise a ValueError also for a schedule without events, which makes no masks to move."""
        super().check(schedule, pattern)
        if not list(schedule.events()):
            raise ValueError(
                f"update={self.name} moves masks that a schedule made, and {type(schedule).__name__}() prunes nothing: choose "
                "a schedule with events, such as Constant."
            )


@dataclass(frozen=True)
class Regrowing(Moving):
    """Moves that drop the lowest kept weights and grow as many pruned ones, which start at 0."""

    grows_by: Literal["gradient", "random"] = "random"

    def check(self, schedule: Schedule, pattern: object) -> None:
        """Raise a ValueError also for a pattern, because weights grow anywhere."""
        super().check(schedule, pattern)
        if pattern is not None:
            raise ValueError(
                f"update={self.name} grows weights anywhere, which pattern={pattern} does not allow: take "
                "pattern=unstructured, or update=ste."
            )


@dataclass(frozen=True)
class Set(Regrowing):
    """SET: at each move the lowest kept weights are dropped and as many pruned ones grow at random.

    Mocanu et al. 2018 (arXiv 1707.04780).
    """

    name = "set"
    label = "the lowest are dropped and as many others grow at random (SET)"


@dataclass(frozen=True)
class Rigl(Regrowing):
    """RigL: at each move the lowest kept weights are dropped and those with the largest gradients grow.

    Evci et al. 2020 (arXiv 1911.11134). A step that moves masks does not update weights. With a falling density this is the
    dense-to-sparse training of GraNet (arXiv 2106.10404).
    """

    name = "rigl"
    label = "the lowest are dropped and those with the largest gradients grow (RigL)"
    gradients = "at moves"
    move_bytes = 4 + 4 + 1

    grows_by: Literal["gradient", "random"] = "gradient"


@dataclass(frozen=True)
class Ste(Moving):
    """STE: the model computes with masked weights, all weights are trained, and masks are chosen anew at each move.

    The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432) on the largest weights, as in jaxpruner. Masks are
    hard: the model is sparse at every step and at the end.
    """

    name = "ste"
    label = "all weights are trained, and masks are chosen anew (straight-through)"
    gradients = "dense"
    state_bytes = 4


@dataclass(frozen=True)
class AcDc(Update):
    """AC/DC: sparse and dense phases in turn; all weights return at 0 in a dense phase, and masks are chosen anew after it.

    Peste et al. 2021 (arXiv 2106.12379).
    """

    name = "acdc"
    label = "all return in dense phases (AC/DC)"
    lets_return = True

    def check(self, schedule: Schedule, pattern: object) -> None:
        """Raise a ValueError for any schedule but `Alternating`, whose dense phases the update needs."""
        if not isinstance(schedule, Alternating):
            raise ValueError(
                f"update=acdc needs dense phases, and schedule {type(schedule).__name__} has none: take schedule=alternating."
            )


UPDATES: Registry[Update] = Registry(
    "update", {update.name: update for update in (Shrink(), Set(), Rigl(), Ste(), AcDc())}, Update
)
