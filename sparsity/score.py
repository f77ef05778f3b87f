"""What ranks a weight: a score turns weights into integer keys, and the smallest keys are pruned first.

A key is an int32 of at least 0. Weights that were pruned before must have the key 0, so that they stay the smallest. A score
of your own extends `Score` and returns `values`; their bits are the keys. Importing this needs no torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from sparsity.factors import factor_of
from sparsity.registry import Method, Registry, name_of

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity.shards import ParameterShard

NUM_KEY_BITS = 31
SIGN_OFF = 0x7FFFFFFF
Need = Literal["gradient", "state"]


class Score(Method):
    """What ranks a weight. Extend it and return `values`, or `keys` if they are not the bits of float32 numbers."""

    needs: tuple[Need, ...] = ()
    """What a shard must hold beside values and mask: "gradient" for `shard.gradient`, the dense gradient of the step before
    the event; "state" for `shard.state`, the optimizer's state by name."""
    has_values: bool = True
    """Whether keys are the bits of float32 numbers, so that factors, norms and the threshold mean something."""
    is_zero_first: bool = False
    """Whether a weight of 0 scores 0, so that a parameter of zeros would go before all others."""
    is_placeless: bool = False
    """Whether it may be asked about weights out of their place: the candidates of a pattern."""

    def values(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the scores [stop - start] of a slice of the shard's local weights, numbers of at least 0.

        Args:
            shard: A parameter's local weights, their mask and their place, see `sparsity.shards.ParameterShard`.
            part: Which of them: `shard.values[part]`, `shard.mask[part]`, `shard.index(part)`.
        """
        raise NotImplementedError

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the keys int32 [stop - start] of a slice of the shard's local weights."""
        import torch

        bits = self.values(shard, part).float().clamp(min=0).view(torch.int32) & SIGN_OFF
        return bits.masked_fill_(~shard.mask[part], 0)

    def seeded(self, seed: int) -> Score:
        """Return the score for a run's seed: itself, unless it draws."""
        return self

    def __call__(self, shard: ParameterShard, part: slice) -> Tensor:
        return self.keys(shard, part)


class Magnitude(Score):
    """The magnitude |w|: the smallest weights go first."""

    name = "magnitude"
    label = "lowest magnitude first"
    is_zero_first = True
    is_placeless = True

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the bits of |w| as float32: they have the order of |w|, denormals and infinities included; NaN comes last.

        bfloat16 and float16 widen to float32 exactly, so parameters of different types compare by value.
        """
        import torch

        values = shard.values[part]
        if values.dtype == torch.float64:
            raise ValueError(
                f"{shard.name} is float64: magnitudes are compared as float32, bfloat16 or float16; convert it."
            )
        return values.float().view(torch.int32) & SIGN_OFF


class Saliency(Score):
    """The saliency |w g|: how much the loss changes, to the first order, if the weight goes."""

    name = "saliency"
    label = "lowest |w g| first"
    needs = ("gradient",)
    is_zero_first = True

    def values(self, shard: ParameterShard, part: slice) -> Tensor:
        assert shard.gradient is not None
        return (shard.values[part].float() * shard.gradient[part]).abs()


class Random(Score):
    """A random order, the control: a hash of (seed, name, flat index in the full tensor), the same for any world size."""

    name = "random"
    label = "in random order"
    has_values = False
    is_placeless = True

    def __init__(self, seed: int | str | None = None) -> None:
        self.seed = seed

    def seeded(self, seed: int) -> Random:
        return Random(seed) if self.seed is None else self

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        import torch

        digest = hashlib.blake2b(
            f"{0 if self.seed is None else self.seed}:{shard.name}".encode(), digest_size=8
        ).digest()
        bits = _mix(shard.index(part) + int.from_bytes(digest, "little", signed=True))
        kept = ((bits >> 33) & SIGN_OFF).clamp_(min=1)
        return kept.masked_fill_(~shard.mask[part], 0).to(torch.int32)


class Scaled(Score):
    """Another score, times a factor for each parameter."""

    def __init__(self, score: Score, factors: Mapping[str, float]) -> None:
        self.score, self.factors = score, dict(factors)
        self.name, self.label, self.needs = score.name, score.label, score.needs
        self.is_zero_first, self.is_placeless = score.is_zero_first, score.is_placeless

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        import torch

        found, factor = self.score(shard, part), factor_of(shard.name, self.factors)
        return found if factor == 1 else (found.view(torch.float32) * factor).view(torch.int32)


def scaled(score: Score, factors: Mapping[str, float]) -> Score:
    """Return `score` with each parameter's keys, read as float32, multiplied by the factor of its name.

    A product is rounded once, to float32: its bits are the key. A power of two shifts the exponent exactly, unless the
    product is a denormal. Products that round to 0 or to infinity tie there. The same for any world size.

    Args:
        score: A score whose keys are the bits of float32 numbers, as those of `magnitude` are.
        factors: Name patterns and their factors, see `sparsity.factors`. Without any, `score` itself is returned.
    """
    return Scaled(score, factors) if factors else score


class Given(Score):
    """Keys that were made before: they are the values."""

    is_placeless = True

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        return shard.values[part]


magnitude = Magnitude()
SCORES: Registry[Score] = Registry("score", {score.name: score for score in (magnitude, Saliency(), Random())}, Score)


def key_spacing_bits(shards: Sequence[ParameterShard], score: Score) -> int:
    """Return how many lower bits are 0 in every key: 16 if all magnitudes are bfloat16.

    Those of float16 would have 13, but torch widens its NaN to more than one pattern of bits.
    """
    import torch

    is_narrow = is_magnitude(score) and all(shard.values.dtype == torch.bfloat16 for shard in shards)
    return 16 if is_narrow else 0


def is_magnitude(score: Score) -> bool:
    """Whether keys are the weights' own bits, which numpy and the kernels read faster than a score makes them."""
    return type(score) is Magnitude


def magnitude_of_key(key: int) -> float:
    """Return the |w| whose key this is."""
    return float(struct.unpack("<f", struct.pack("<I", key))[0])


def score_name(score: str | Score) -> str:
    """Return the name of a score or of a choice."""
    return score if isinstance(score, str) else name_of(score)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014) on int64, wrapping around."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's `>>` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
