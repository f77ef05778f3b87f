"""Schedules say when weights are pruned and how many remain: they give the density as a function of the step.

This needs only the standard library, so that a plan can be printed before torch is imported. A *step* is an optimizer step,
counted from 0. `density(step)` holds while that step runs, because an event at step s runs before it. *Compute* is
measured in dense-equivalent steps: the sum of the density over the steps (arXiv 2501.12486).

Every schedule is a staircase over its events. Schedules differ only in one method, `kept`: the share of weights that remains
when a given share of the events is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from sparsity.arguments import check_number, check_whole
from sparsity.registry import Method, Registry
from sparsity.staircase import Staircase

DEFAULT_EVERY_STEPS = 100


class Schedule(Protocol):
    """The interface of a schedule that the callback uses."""

    def density(self, step: int) -> float:
        """Return the share of weights kept while `step` runs."""

    def events(self) -> Sequence[int]:
        """Return the steps before which weights are pruned."""

    def average_density(self, num_steps: int) -> float:
        """Return the mean density over the first `num_steps` steps."""


@dataclass(frozen=True)
class Ramp(Staircase, Method):
    """A staircase down to the density 1 - sparsity. A subclass gives the curve in `kept`.

    Raises:
        ValueError: The sparsity is outside [0, 1), or the window is reversed or not divisible by `every_steps`.
    """

    events_per_phase = 1
    """The number of events is 1 plus a multiple of this."""

    sparsity: float
    """The share of the prunable weights that is pruned after the last event."""
    start_step: int
    """The step of the first event."""
    end_step: int
    """The step of the last event."""
    every_steps: int = DEFAULT_EVERY_STEPS
    """The number of steps between events."""

    @staticmethod
    def kept(sparsity: float, progress: float) -> float:
        """Return the share of weights that remains after a part of the events.

        Args:
            sparsity: The final sparsity.
            progress: The share of the events that is done, in (0, 1]. At 1 the result must be 1 - `sparsity`.
        """
        raise NotImplementedError

    @classmethod
    def kept_after(cls, sparsity: float, event: int, num_events: int) -> float:
        """Return the share of weights that remains after event number `event` of `num_events`, counted from 0."""
        return 1.0 - sparsity if event == num_events - 1 else cls.kept(sparsity, (event + 1) / num_events)

    @classmethod
    def over(cls, sparsity: float, start_step: int, end_step: int, every_steps: int) -> Self:
        """Return the schedule of a window; schedules with a single event ignore its end and interval."""
        return cls(sparsity, start_step, end_step, every_steps)

    @property
    def base(self) -> Ramp:
        """The schedule itself; that of all groups if they have their own targets, see `sparsity.mixed`."""
        return self

    def __post_init__(self) -> None:
        kinds = type(self).__mro__
        if not {"kept", "kept_after", "density_after", "density"} & {
            name for kind in kinds[: kinds.index(Ramp)] for name in vars(kind)
        }:
            raise ValueError(
                f"{type(self).__name__} has no curve: take Geometric, or another schedule of sparsity.schedule, or define "
                "`kept` in a class that extends Ramp."
            )
        check_number("sparsity", self.sparsity, 0.8)
        for name, example in (("start_step", 0), ("end_step", 1000), ("every_steps", DEFAULT_EVERY_STEPS)):
            check_whole(name, getattr(self, name), example)
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"sparsity={self.sparsity} is outside [0, 1): give the share of weights to remove, 0.8 for 80 %."
            )
        if self.every_steps < 1:
            raise ValueError(f"every_steps={self.every_steps} must be at least 1 step.")
        if self.start_step < 0:
            raise ValueError(f"start_step={self.start_step} is before the run: the first step is 0.")
        if self.end_step < self.start_step:
            raise ValueError(
                f"The prune window is reversed: end_step={self.end_step} is before start_step={self.start_step}; swap them."
            )
        if (self.end_step - self.start_step) % self.every_steps:
            raise ValueError(
                f"The prune window of {self.end_step - self.start_step} steps ({self.start_step} to {self.end_step}) is "
                f"not divisible by every_steps={self.every_steps}: {_divisor_hint(self)}."
            )

    def density_after(self, event: int) -> float:
        """Return the density that `kept_after` gives at this schedule's sparsity."""
        return self.kept_after(self.sparsity, event, self.num_events)


@dataclass(frozen=True)
class Geometric(Ramp):
    """Each event removes the same share of what remains: event k of n leaves (1 - sparsity)^((k + 1) / n).

    The schedule of "The Journey Matters" (arXiv 2501.12486).
    """

    name = "geometric"
    label = "each time the same share of the remaining weights"

    @staticmethod
    def kept(sparsity: float, progress: float) -> float:
        """Return (1 - sparsity)^progress."""
        return float((1.0 - sparsity) ** progress)


@dataclass(frozen=True)
class Cubic(Ramp):
    """Fast first, then ever slower: event k of n leaves 1 - sparsity (1 - (1 - (k + 1) / n)^3).

    The curve of Zhu and Gupta (arXiv 1710.01878) from a dense model, without their first step, which prunes nothing.
    """

    name = "cubic"
    label = "fewer each time, by a cubic (Zhu and Gupta 2017)"

    @staticmethod
    def kept(sparsity: float, progress: float) -> float:
        """Return 1 - sparsity (1 - (1 - progress)^3)."""
        return 1.0 - sparsity * (1.0 - (1.0 - progress) ** 3)


@dataclass(frozen=True)
class Linear(Ramp):
    """Each event removes the same number of weights: event k of n leaves 1 - sparsity (k + 1) / n."""

    name = "linear"
    label = "each time the same number of weights"

    @staticmethod
    def kept(sparsity: float, progress: float) -> float:
        """Return 1 - sparsity progress."""
        return 1.0 - sparsity * progress


@dataclass(frozen=True)
class OneShot(Ramp):
    """All at once: one event, at start_step."""

    name = "one_shot"
    label = "all at once"

    end_step: int = field(init=False, default=0)
    every_steps: int = field(init=False, default=1)

    @staticmethod
    def kept(sparsity: float, progress: float) -> float:
        """Return 1 - sparsity: the only event is the last one."""
        return 1.0 - sparsity

    @classmethod
    def over(cls, sparsity: float, start_step: int, end_step: int, every_steps: int) -> Self:
        """Return the schedule with its event at `start_step`."""
        return cls(sparsity, start_step)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end_step", self.start_step)
        super().__post_init__()


@dataclass(frozen=True)
class Constant(OneShot):
    """Sparse from initialization: the masks have the full sparsity before the first step."""

    name = "constant"
    label = "all at once, before the first step"

    start_step: int = field(init=False, default=0)

    @classmethod
    def over(cls, sparsity: float, start_step: int, end_step: int, every_steps: int) -> Self:
        """Return the schedule with its event at step 0, whatever the window."""
        return cls(sparsity)


@dataclass(frozen=True)
class Alternating(Ramp):
    """Sparse and dense phases in turn: even events leave 1 - sparsity, odd events leave all weights.

    These are the phases of AC/DC (arXiv 2106.12379). Each lasts `every_steps`. The last event, which is even, begins a sparse
    phase that lasts to the end of the run.
    """

    name = "alternating"
    label = "sparse and dense phases in turn"
    events_per_phase = 2

    @classmethod
    def kept_after(cls, sparsity: float, event: int, num_events: int) -> float:
        """Return 1 - sparsity after even events and 1 after odd ones."""
        return 1.0 if event % 2 else 1.0 - sparsity

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_events % 2 == 0:
            raise ValueError(
                f"The prune window from {self.start_step} to {self.end_step} has {self.num_events} phases of "
                f"{self.every_steps} steps and would end dense: end it {self.every_steps} steps earlier or later."
            )


@dataclass(frozen=True)
class Fixed:
    """A schedule without events: weights that are zero when the run begins stay zero, and no others are pruned."""

    def density(self, step: int) -> float:
        """Return 1: the schedule itself prunes nothing."""
        return 1.0

    def events(self) -> Sequence[int]:
        """Return no steps."""
        return ()

    def average_density(self, num_steps: int) -> float:
        """Return 1, whatever zeros the model has."""
        return 1.0


SCHEDULES: Registry[type[Ramp]] = Registry(
    "schedule",
    {schedule.name: schedule for schedule in (Geometric, Cubic, Linear, OneShot, Constant, Alternating)},
    Ramp,
)


def _divisor_hint(schedule: Ramp) -> str:
    length = schedule.end_step - schedule.start_step
    below = next(n for n in range(min(schedule.every_steps, length), 0, -1) if length % n == 0)
    end = schedule.start_step + length // schedule.every_steps * schedule.every_steps
    return f"take every_steps={below} or end at {end}"
