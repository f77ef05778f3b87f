"""One-sentence refusals that every group of keys shares."""

from __future__ import annotations


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{key}={value} is not known: choose one of {', '.join(choices)}.")
