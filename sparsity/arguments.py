"""Checks of the types of arguments, so that a wrong one is refused where it is given and not in the middle of a run.

This needs only the standard library.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: Any, example: int) -> None:
    """Raise a ValueError unless `value` is a whole number; `example` is one that the message can suggest."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        is_near = isinstance(value, Real) and not isinstance(value, bool) and value == value // 1
        raise ValueError(
            f"{name}={value!r} is not a whole number: give one, such as {int(value) if is_near else example}."
        )


def check_number(name: str, value: Any, example: float) -> None:
    """Raise a ValueError unless `value` is a real number; `example` is one that the message can suggest."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} is not a number: give one, such as {example}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is True or False, also numpy's."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{name}={value!r} is neither True nor False: give one of them.")


def check_patterns(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a list, tuple or set of name patterns; one text would be read letter by letter."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is one text, not a list of name patterns: give [{value!r}].")
    if not isinstance(value, Collection) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{name}={value!r} is not a list of name patterns: give one, such as ['*mlp*'].")


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Raise a TypeError, as Python does, for the first keyword argument that is not one of `known`."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
            raise TypeError(f"There is no argument {name!r}: {hint}")


def check_schedule(schedule: Any) -> None:
    """Raise a ValueError unless `schedule` has the methods of a schedule, and gives steps and densities that can be."""
    methods = ("density", "events", "average_density")
    if inspect.isclass(schedule) or not all(callable(getattr(schedule, method, None)) for method in methods):
        found = f"{schedule.__name__} is a class" if inspect.isclass(schedule) else f"{schedule!r} is no schedule"
        raise ValueError(
            f"schedule={found}: give an instance, such as Geometric(sparsity=0.8, start_step=100, end_step=900, "
            "every_steps=100)."
        )
    for event in schedule.events():
        check_whole(f"an event of schedule {type(schedule).__name__}", event, 0)
        density = schedule.density(event)
        if event < 0 or not 0 < density <= 1:
            raise ValueError(
                f"The schedule {type(schedule).__name__} keeps a share of {density} at step {event}: events must be at step 0 "
                "or later, and shares in (0, 1]."
            )
