"""Conversion of windows in steps, tokens or shares of the run's compute into schedules of whole steps.

The compute of a window depends on its schedule only through the mean density between its first and its last event, so one
solver works for all schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from sparsity.schedule import DEFAULT_EVERY_STEPS, Geometric, Ramp

Unit = Literal["auto", "steps", "tokens", "compute"]
Shares = Sequence[tuple[float, float]]
"""(share of the prunable weights, final sparsity) for each group of weights."""
DEFAULT_NUM_INTERVALS = 20


def mean_window_density(kind: type[Ramp], shares: Shares, num_events: int) -> float:
    """Return the mean density from the first event of a window until just before its last."""
    if num_events < 2:
        return 1.0
    return math.fsum(
        share * kind.kept_after(sparsity, event, num_events)
        for share, sparsity in shares
        for event in range(num_events - 1)
    ) / (num_events - 1)


def compute_window(
    sparsity: float,
    start: float,
    end: float,
    *,
    num_steps: int | None = None,
    budget: float | None = None,
    every_steps: int | None = None,
    kind: type[Ramp] = Geometric,
    shares: Shares | None = None,
) -> tuple[Ramp, int]:
    """Return the schedule that prunes from the share `start` to the share `end` of the run's compute, and the run's steps.

    Start and window are multiples of `every_steps`, so the shares are exact to within one interval.

    Args:
        sparsity: The final sparsity.
        start: The share of the compute at the first event.
        end: The share of the compute at the last event.
        num_steps: The steps of the run; give either these or `budget`.
        budget: The compute of the run in dense-equivalent steps, from which the number of steps follows.
        every_steps: Steps between events; None: a twentieth of the window, at most 100.
        kind: The class of the schedule.
        shares: Groups with their own final sparsities; None: all weights end at `sparsity`.

    Raises:
        ValueError: The shares are not in order, or the window is too short for `every_steps`.
    """
    if (num_steps is None) == (budget is None):
        raise ValueError("Give either the number of steps or a compute budget.")
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"The prune window from {start} to {end} of the compute must be in order and inside 0 to 1: give two shares."
        )
    shares = shares or ((1.0, sparsity),)
    final_density = math.fsum(share * (1 - own) for share, own in shares)
    num_events = 1000
    every = every_steps or 1
    compute = budget or 0.0
    # The number of events sets the mean density of the window, which sets its length, which sets the number of events.
    for _ in range(4):
        mean = mean_window_density(kind, shares, num_events)
        if num_steps is not None:
            compute = num_steps / (start + (end - start) / mean + (1 - end) / final_density)
        window = (end - start) * compute / mean
        every = every_steps or min(DEFAULT_EVERY_STEPS, max(1, int(window // DEFAULT_NUM_INTERVALS)))
        num_events = round(window / every / kind.events_per_phase) * kind.events_per_phase + 1
    start_step = round(start * compute / every) * every
    end_step = start_step + (num_events - 1) * every
    if num_steps is None:
        num_steps = max(end_step + round((1 - end) * compute / final_density), end_step + 1)
    while end_step > num_steps - 1 and end_step > start_step:
        end_step -= every * kind.events_per_phase
    if every_steps and end > start and (end_step == start_step or (start > 0 and start_step == 0)):
        raise ValueError(
            f"every={every_steps} steps between events is too long for a window from {start:g} to {end:g} of the compute, "
            f"about {window:.0f} steps: use at most {max(1, int(window // DEFAULT_NUM_INTERVALS))}, or leave it null."
        )
    schedule = kind.over(sparsity, min(start_step, num_steps - 1), min(end_step, num_steps - 1), every)
    return schedule, num_steps


def schedule_of_window(
    sparsity: float,
    start: float,
    end: float,
    *,
    of: Unit,
    every_steps: int | None,
    num_steps: int,
    batch_tokens: int,
    kind: type[Ramp] = Geometric,
    shares: Shares | None = None,
) -> Ramp:
    """Return the schedule of a window in steps, in tokens, or in shares of the run's compute.

    Args:
        sparsity: The final sparsity.
        start: The first event, in the unit `of`.
        end: The last event, in the unit `of`.
        of: The unit; "auto" reads two numbers up to 1 as shares of compute and larger ones as steps.
        every_steps: Steps between events; None derives them from the window.
        num_steps: The steps of the run.
        batch_tokens: Tokens of a step.
        kind: The class of the schedule.
        shares: Groups with their own final sparsities; None: all weights end at `sparsity`.

    Raises:
        ValueError: The window is reversed, mixes units, is not in whole steps, or does not end inside the run.
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
        return compute_window(
            sparsity, start, end, num_steps=num_steps, every_steps=every_steps, kind=kind, shares=shares
        )[0]
    scale = batch_tokens if of == "tokens" else 1
    first, last = round(start / scale), round(end / scale)
    if of == "tokens":
        every_steps = every_steps or max(1, min(DEFAULT_EVERY_STEPS, (last - first) // 7))
        phase = every_steps * kind.events_per_phase
        last = first + round((last - first) / phase) * phase
    elif of == "steps" and (start, end) != (first, last):
        raise ValueError(f"The prune window from {start} to {end} is not in whole steps: give whole numbers.")
    schedule = kind.over(sparsity, first, last, every_steps or _interval(last - first, kind.events_per_phase))
    schedule.check_fits(num_steps)
    return schedule


def _interval(window: int, events_per_phase: int) -> int:
    """Return the longest interval, at most 100 steps, that divides the window into at least 7 intervals (8 events)."""
    longest = max(1, min(DEFAULT_EVERY_STEPS, window // 7))
    interval = next(n for n in range(longest, 0, -1) if n == 1 or window % (n * events_per_phase) == 0)
    if interval * 10 < longest:
        raise ValueError(
            f"The prune window of {window} steps has no divisor near {longest} to prune by: give sparsity.window.every, or "
            f"end it {window % longest} steps earlier."
        )
    return interval
