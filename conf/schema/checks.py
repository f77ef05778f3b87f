"""One-sentence refusals that every group of keys shares."""

from __future__ import annotations

from typing import Any


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{key}={value} is not known: choose one of {', '.join(choices)}.")


def names_of(runs: Any) -> list[str]:
    """The value of `runs`, one name or a list of them, as a list; a ValueError where it names nothing."""
    names = [runs] if isinstance(runs, str) else runs
    check(
        isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names),
        f"runs={runs} names nothing: give run folders, a folder of runs, a pattern, or a CSV file.",
    )
    return list(names)
