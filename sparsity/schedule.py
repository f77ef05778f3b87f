"""When weights are pruned and how many remain: density as a function of the step.

Nothing but the standard library is needed here, so that a plan can be printed before torch is imported. A *step* is an
optimizer step and counts from 0; `density(step)` is in force while that step trains, because an event at step s runs
before it. *Compute* is measured in dense-equivalent steps: the sum of the density over the steps (arXiv 2501.12486).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Unit = Literal["auto", "steps", "tokens", "compute"]
DEFAULT_EVERY_STEPS = 100
DEFAULT_NUM_INTERVALS = 20


class Schedule(Protocol):
    """What the callback, the plan and the report need to know of a schedule."""

    def density(self, step: int) -> float: ...

    def events(self) -> Sequence[int]: ...

    def average_density(self, num_steps: int) -> float: ...


@dataclass(frozen=True)
class Geometric:
    """Event k of n leaves the density (1 - sparsity)^((k + 1) / n): each removes the same share of what remains.

    Events run at start_step, start_step + every_steps, ..., end_step, each before that step trains.
    """

    sparsity: float
    start_step: int
    end_step: int
    every_steps: int = DEFAULT_EVERY_STEPS

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} is outside [0, 1): give the share of weights to remove.")
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

    @property
    def num_events(self) -> int:
        return (self.end_step - self.start_step) // self.every_steps + 1

    def events(self) -> range:
        """The steps before which weights are pruned."""
        return range(self.start_step, self.end_step + 1, self.every_steps)

    def density_after(self, event: int) -> float:
        """Share of the prunable weights kept after event number `event`, counted from 0."""
        if event == self.num_events - 1:
            return 1.0 - self.sparsity
        return float((1.0 - self.sparsity) ** ((event + 1) / self.num_events))

    def density(self, step: int) -> float:
        """Share of the prunable weights kept while `step` trains, in (0, 1]."""
        if step < self.start_step:
            return 1.0
        return self.density_after(min((step - self.start_step) // self.every_steps, self.num_events - 1))

    def average_density(self, num_steps: int) -> float:
        """Mean of density(step) over steps 0 .. num_steps - 1."""
        return self.dense_equivalent_steps(num_steps) / num_steps

    def dense_equivalent_steps(self, num_steps: int) -> float:
        """Sum of density(step) over steps 0 .. num_steps - 1: the run's compute in steps of the dense model."""
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1.")
        edges = [0, *self.events(), num_steps]
        densities = [1.0, *(self.density_after(event) for event in range(self.num_events))]
        return math.fsum(
            density * max(0, min(edges[i + 1], num_steps) - edges[i]) for i, density in enumerate(densities)
        )

    def check_fits(self, num_steps: int) -> None:
        """Refuse a run in which the last event would never run."""
        if self.end_step > num_steps - 1:
            raise ValueError(
                f"The prune window ends at step {self.end_step}, outside a run of {num_steps} steps: its last event must "
                f"come before step {num_steps - 1} trains; end the window earlier or train longer."
            )


def _divisor_hint(schedule: Geometric) -> str:
    length = schedule.end_step - schedule.start_step
    below = next(n for n in range(min(schedule.every_steps, length), 0, -1) if length % n == 0)
    end = schedule.start_step + length // schedule.every_steps * schedule.every_steps
    return f"take every_steps={below} or end at {end}"


@dataclass(frozen=True)
class Unpruned:
    """No event at all: what is pruned when the run begins is all that ever is."""

    def density(self, step: int) -> float:
        return 1.0

    def events(self) -> Sequence[int]:
        return ()

    def average_density(self, num_steps: int) -> float:
        return 1.0


def mean_window_density(sparsity: float, num_events: int) -> float:
    """Mean density from the first event of a geometric window to just before its last."""
    if num_events < 2 or sparsity == 0:
        return 1.0
    return math.fsum((1 - sparsity) ** ((event + 1) / num_events) for event in range(num_events - 1)) / (num_events - 1)


def compute_window(
    sparsity: float,
    start: float,
    end: float,
    *,
    num_steps: int | None = None,
    budget: float | None = None,
    every_steps: int | None = None,
) -> tuple[Geometric, int]:
    """The geometric schedule that prunes from the share `start` to the share `end` of the run's compute, and its steps.

    Either the number of steps is given or the compute `budget` in dense-equivalent steps, from which the number of
    steps follows. Start and window are multiples of `every_steps`, so the shares hold to within one interval. Where
    `every_steps` is None it is a twentieth of the window, at most 100.
    """
    if (num_steps is None) == (budget is None):
        raise ValueError("Give either the number of steps or a compute budget.")
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"The prune window from {start} to {end} of the compute must be in order and inside 0 to 1: give two shares."
        )
    num_events = 1000
    every = every_steps or 1
    compute = budget or 0.0
    # The number of events sets the mean density of the window, which sets its length, which sets the number of events.
    for _ in range(4):
        mean = mean_window_density(sparsity, num_events)
        if num_steps is not None:
            compute = num_steps / (start + (end - start) / mean + (1 - end) / (1 - sparsity))
        window = (end - start) * compute / mean
        every = every_steps or min(DEFAULT_EVERY_STEPS, max(1, int(window // DEFAULT_NUM_INTERVALS)))
        num_events = round(window / every) + 1
    start_step = round(start * compute / every) * every
    end_step = start_step + (num_events - 1) * every
    if num_steps is None:
        num_steps = max(end_step + round((1 - end) * compute / (1 - sparsity)), end_step + 1)
    while end_step > num_steps - 1 and end_step > start_step:
        end_step -= every
    if every_steps and end > start and (end_step == start_step or (start > 0 and start_step == 0)):
        raise ValueError(
            f"every={every_steps} steps between events is too long for a window from {start:g} to {end:g} of the compute, "
            f"about {window:.0f} steps: take at most {max(1, int(window // DEFAULT_NUM_INTERVALS))}, or leave it null."
        )
    schedule = Geometric(sparsity, min(start_step, num_steps - 1), min(end_step, num_steps - 1), every)
    return schedule, num_steps


def geometric_window(
    sparsity: float,
    start: float,
    end: float,
    *,
    of: Unit,
    every_steps: int | None,
    num_steps: int,
    batch_tokens: int,
) -> Geometric:
    """The schedule of a window as users write it: in steps, in tokens, or in shares of the run's compute.

    `auto` reads two numbers up to 1 as shares and larger ones as steps. The schedule is checked to end inside the run.
    """
    if of == "auto":
        if max(start, end) > 1 and any(0 < value < 1 for value in (start, end)):
            raise ValueError(
                f"The prune window from {start} to {end} mixes a share with a step: give both in the same unit."
            )
        of = "compute" if max(start, end) <= 1 else "steps"
    if end < start:
        raise ValueError(f"The prune window is reversed: its end {end} is before its start {start}; swap them.")
    if of == "compute":
        return compute_window(sparsity, start, end, num_steps=num_steps, every_steps=every_steps)[0]
    scale = batch_tokens if of == "tokens" else 1
    first, last = round(start / scale), round(end / scale)
    if of == "tokens":
        every_steps = every_steps or max(1, min(DEFAULT_EVERY_STEPS, (last - first) // 7))
        last = first + round((last - first) / every_steps) * every_steps
    elif of == "steps" and (start, end) != (first, last):
        raise ValueError(f"The prune window from {start} to {end} is not in whole steps: give whole numbers.")
    schedule = Geometric(sparsity, first, last, every_steps or _interval(last - first))
    schedule.check_fits(num_steps)
    return schedule


def _interval(window: int) -> int:
    """The longest interval of at most 100 steps that divides the window into at least 7, that is 8 events."""
    longest = max(1, min(DEFAULT_EVERY_STEPS, window // 7))
    interval = next(n for n in range(longest, 0, -1) if window % n == 0)
    if interval * 10 < longest:
        raise ValueError(
            f"The prune window of {window} steps has no divisor near {longest} to prune by: give sparsity.window.every, or "
            f"end it {window % longest} steps earlier."
        )
    return interval
