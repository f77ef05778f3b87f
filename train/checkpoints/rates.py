"""The learning rate schedule of a resumed run, and of a branch, which has a schedule of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def load_rates(scheduler: Any, saved: Mapping[str, Any], step: int, branches: bool) -> None:
    """Load the state of a schedule; the rates themselves are loaded with the optimizer.

    Args:
        scheduler: The schedule of this run.
        saved: Its state in the checkpoint.
        step: The step of the checkpoint.
        branches: Whether the checkpoint came from another run, whose schedule may differ.
    """
    is_fixed, was_fixed = hasattr(scheduler, "lr_lambdas"), "base_lrs" in saved
    if is_fixed and branches:
        # Skipped updates may have held the other run's schedule back.
        move_schedule_to(scheduler, saved["last_epoch"] if was_fixed else step)
    elif is_fixed:
        scheduler.load_state_dict({**saved, "lr_lambdas": [None] * len(saved["base_lrs"])})
    elif not was_fixed:
        # Schedules that follow the evaluations, such as reduce_lr_on_plateau.
        scheduler.load_state_dict(dict(saved))


def keeps_rates(scheduler: Any, saved: Mapping[str, Any], branches: bool) -> bool:
    """Return whether the saved rates are this run's: always, except in a branch whose schedule computes its own."""
    return not branches or not (hasattr(scheduler, "lr_lambdas") or "base_lrs" in saved)


def move_schedule_to(scheduler: Any, step: int) -> None:
    """Set a schedule to its rate after `step` steps, as if it had run them."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * at(step) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
