"""Factors on scores: a weight is ranked by its score times the factor of its parameter.

Factors are given by name pattern. This needs only the standard library, so that a plan and a run make the same checks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sparsity.arguments import check_number
from sparsity.registry import name_of

if TYPE_CHECKING:
    from sparsity.scope import Scope
    from sparsity.score import Score

NORMS = ("none", "l2", "rms")


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Return the factor of a parameter, rounded to float32; 1 if no pattern matches its name."""
    return next((_as_float32(factor) for pattern, factor in factors.items() if fnmatchcase(name, pattern)), 1.0)


def check_factors(factors: Mapping[str, float], score: Score, scope: Scope, normalize: str = "none") -> None:
    """Check that factors are positive numbers in float32, and that score and scope use the factors and norms given.

    Raises:
        ValueError: A factor is not such a number, or a factor or norm would have no effect.
    """
    if normalize not in NORMS:
        raise ValueError(f"normalize={normalize} is not known: choose one of {', '.join(NORMS)}.")
    for pattern, factor in factors.items():
        check_number(f"factors[{pattern!r}]", factor, 0.0625)
        rounded = _as_float32(factor)
        if not (math.isfinite(rounded) and rounded > 0):
            raise ValueError(
                f"The factor {factor} of {pattern!r} in factors is not a positive number that float32 can hold: give one, "
                "such as 0.0625, or name the parameters in requires_dense to keep them."
            )
    given = {"factors have": bool(factors), f"normalize={normalize} has": normalize != "none"}
    for words in (words for words, is_given in given.items() if is_given):
        if not score.has_values:
            raise ValueError(
                f"{words} no effect with score={name_of(score)}, which does not look at the weights: leave them out, or "
                "use score=magnitude."
            )
        if not scope.compares_parameters:
            raise ValueError(
                f"{words} no effect with scope={name_of(scope)}, which compares a weight only with those of its own "
                "parameter: leave them out, or use scope=global."
            )


def check_factor_names(names: Iterable[str], factors: Mapping[str, float]) -> None:
    """Check that each pattern matches one of the prunable parameters `names`, and no parameter matches two patterns.

    Raises:
        ValueError: A pattern matches nothing, or a parameter matches two patterns.
    """
    names = list(names)
    for pattern in factors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"The pattern {pattern!r} in factors matches no prunable parameter: patterns are compared with names like "
                f"{next(iter(names), '')!r}, * matches anything."
            )
    for name in names:
        claims = [pattern for pattern in factors if fnmatchcase(name, pattern)]
        if len(claims) > 1:
            raise ValueError(
                f"{name} matches two patterns in factors, {claims[0]!r} and {claims[1]!r}: let only one of them match it."
            )


def _as_float32(factor: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", factor))[0])
    except OverflowError:
        return math.inf
