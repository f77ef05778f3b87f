"""Factors on scores: a weight is ranked by its score times the factor of its parameter.

Factors are given by name pattern. Importing this needs no torch, so that a plan and a run make the same checks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sparsity.arguments import check_number
from sparsity.registry import name_of
from sparsity.scope import Scope
from sparsity.score import Score

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity.shards import ParameterShard

NORMS = ("none", "l2", "rms")


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Return the factor of a parameter, rounded to float32; 1 if no pattern matches its name."""
    return next((_as_float32(factor) for pattern, factor in factors.items() if fnmatchcase(name, pattern)), 1.0)


class Scaled(Score):
    """Another score, multiplied by a factor for each parameter."""

    def __init__(self, score: Score, factors: Mapping[str, float]) -> None:
        self.score, self.factors = score, dict(factors)
        self.name, self.label, self.needs = score.name, score.label, score.needs
        self.is_zero_first, self.is_placeless = score.is_zero_first, score.is_placeless

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the other score's keys, read as float32 and multiplied by the factor."""
        import torch

        found, factor = self.score(shard, part), factor_of(shard.name, self.factors)
        return found if factor == 1 else (found.view(torch.float32) * factor).view(torch.int32)


def scaled(score: Score, factors: Mapping[str, float]) -> Score:
    """Return `score` with each parameter's keys, read as float32, multiplied by the factor of its name.

    A product is rounded once, to float32, and its bits are the key. A factor that is a power of two is exact unless the
    product is a denormal. Products that round to 0 or to infinity are ties. Keys do not depend on the world size.

    Args:
        score: A score whose keys are the bits of float32 numbers, such as `magnitude`.
        factors: Name patterns and their factors. If empty, `score` itself is returned.
    """
    return Scaled(score, factors) if factors else score


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
