"""Checks that several groups of keys share; each raises a ValueError of one sentence."""

from __future__ import annotations

from typing import Any

MAX_STEPS = 100_000_000
"""The most steps of a run: its schedule's events are held in memory."""


def check(condition: bool, message: str) -> None:
    """Check a rule.

    Raises:
        ValueError: `condition` is false; `message` says what the rule is.
    """
    if not condition:
        raise ValueError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the choices.

    Raises:
        ValueError: It is not.
    """
    check(value in choices, f"{key}={value} is not known: choose one of {', '.join(choices)}.")


def names_of(runs: Any, least: int = 1) -> list[str]:
    """Return the value of `runs`, one name or a list of names, as a list.

    Raises:
        ValueError: There are fewer than `least` names.
    """
    names = [runs] if isinstance(runs, str) else runs
    check(
        isinstance(names, list) and len(names) >= least and all(isinstance(name, str) and name for name in names),
        f"runs={runs} names nothing: give run folders, a folder of runs, or a pattern of them.",
    )
    return list(names)
