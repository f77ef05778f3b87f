"""Scores rank weights: a score turns weights into integer keys, and the weights with the smallest keys are pruned first.

A key is an int32 of at least 0. Weights that are pruned already must have the key 0, so that they stay the smallest. To write
a score, extend `Score` and return `values`; their bits become the keys. Importing this needs no torch.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from sparsity.arguments import check_whole
from sparsity.registry import Method, Registry, name_of
from sparsity.update import WEIGHT_GRADIENT_SHARE

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity.schedule import Schedule
    from sparsity.shards import ParameterShard

NUM_KEY_BITS = 31
SIGN_OFF = 0x7FFFFFFF
Need = Literal["gradient", "state", "activations"]


class Score(Method):
    """The rule that ranks weights. A subclass returns `values`, or `keys` if these are not the bits of float32 numbers."""

    needs: tuple[Need, ...] = ()
    """The data that a shard must hold in addition to values and mask: "gradient" for `shard.gradient`, the dense gradient
    of the step before the event; "state" for `shard.state`, the optimizer's state by name; "activations" for
    `shard.input_norms`, the norm of each of the layer's inputs over calibration text."""
    has_values: bool = True
    """True if keys are the bits of float32 numbers; only then do factors, norms and the threshold have a meaning."""
    is_zero_first: bool = False
    """True if a weight of 0 scores 0, so that a parameter of all zeros would be pruned before all others."""
    is_placeless: bool = False
    """True if keys do not depend on positions, so that weights can be ranked outside their tensor, as a pattern requires."""

    def values(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the scores of a slice of the shard's local weights, numbers [stop - start] of at least 0.

        Args:
            shard: A parameter's local weights, their mask and position, see `sparsity.shards.ParameterShard`.
            part: The slice: use `shard.values[part]`, `shard.mask[part]`, `shard.index(part)`.
        """
        raise NotImplementedError

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the keys int32 [stop - start] of a slice of the shard's local weights."""
        import torch

        bits = self.values(shard, part).float().clamp(min=0).view(torch.int32) & SIGN_OFF
        return bits.masked_fill_(~shard.mask[part], 0)

    def seeded(self, seed: int) -> Score:
        """Return the score with a run's seed: the score itself, unless it is random."""
        return self

    def extra_compute(self, schedule: Schedule, num_steps: int) -> float:
        """Return the compute beyond the sum of densities, in steps of the dense model: gradients of pruned weights."""
        if "gradient" not in self.needs:
            return 0.0
        before = [event - 1 for event in schedule.events() if 0 < event < num_steps]
        return WEIGHT_GRADIENT_SHARE * math.fsum(1 - schedule.density(step) for step in before)

    def __call__(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the `keys`."""
        return self.keys(shard, part)


class Magnitude(Score):
    """The magnitude |w|: the smallest weights go first."""

    name = "magnitude"
    label = "lowest magnitude first"
    is_zero_first = True
    is_placeless = True

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the bits of |w| as float32.

        As integers they have the same order as |w|, including denormals and infinities; NaN is last. bfloat16 and float16
        convert to float32 exactly, so parameters of different types compare by value.

        Raises:
            ValueError: The weights are float64.
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
        """Return |w g|, with the gradient of the step before the event."""
        assert shard.gradient is not None
        return (shard.values[part].float() * shard.gradient[part]).abs()


class Wanda(Score):
    """The magnitude |w| times the L2 norm of the weight's input over calibration text; usual with scope=row.

    Sun et al. 2023 (arXiv 2306.11695).
    """

    name = "wanda"
    label = "lowest |w| times the norm of its input first"
    needs = ("activations",)
    is_zero_first = True

    def values(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return |w| times the norm of the input in the weight's column."""
        assert shard.input_norms is not None
        return shard.values[part].float().abs() * shard.input_norms[shard.index(part) % shard.shape[-1]]


class Random(Score):
    """A random order, the control: a hash of (seed, name, flat index in the full tensor), the same for any world size."""

    name = "random"
    label = "in random order"
    has_values = False
    is_placeless = True

    def __init__(self, seed: int | str | None = None) -> None:
        if seed is not None and not isinstance(seed, str):
            check_whole("seed", seed, 0)
        self.seed = seed

    def seeded(self, seed: int) -> Random:
        """Return a score with the run's seed, unless this one has its own."""
        return Random(seed) if self.seed is None else self

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return hashes of the weights' places, at least 1 for kept weights."""
        import torch

        digest = hashlib.blake2b(
            f"{0 if self.seed is None else self.seed}:{shard.name}".encode(), digest_size=8
        ).digest()
        bits = _mix(shard.index(part) + int.from_bytes(digest, "little", signed=True))
        kept = ((bits >> 33) & SIGN_OFF).clamp_(min=1)
        return kept.masked_fill_(~shard.mask[part], 0).to(torch.int32)


class Given(Score):
    """Keys that were computed earlier and are stored as the shard's values."""

    is_placeless = True

    def keys(self, shard: ParameterShard, part: slice) -> Tensor:
        """Return the values, which are keys already."""
        return shard.values[part]


magnitude = Magnitude()
SCORES: Registry[Score] = Registry(
    "score", {score.name: score for score in (magnitude, Saliency(), Wanda(), Random())}, Score
)


def key_spacing_bits(shards: Sequence[ParameterShard], score: Score) -> int:
    """Return how many low bits are 0 in every key: 16 if all keys are magnitudes of bfloat16, else 0.

    Keys of float16 would have 13, but torch converts a float16 NaN to more than one float32 bit pattern.
    """
    import torch

    is_narrow = is_magnitude(score) and all(shard.values.dtype == torch.bfloat16 for shard in shards)
    return 16 if is_narrow else 0


def is_magnitude(score: Score) -> bool:
    """Return whether keys are the weights' own bits; numpy and the kernels read those faster than a score computes keys."""
    return type(score) is Magnitude


def magnitude_of_key(key: int) -> float:
    """Return the |w| that has this key."""
    return float(struct.unpack("<f", struct.pack("<I", key))[0])


def check_score(score: Score) -> None:
    """Raise a ValueError if a score does not say how it ranks weights, or needs something that no pruner lends."""
    if type(score).values is Score.values and type(score).keys is Score.keys:
        raise ValueError(
            f"score={name_of(score)} does not rank weights: define `values` in a class that extends Score."
        )
    known = get_args(Need)
    if isinstance(score.needs, str) or not {*score.needs} <= {*known}:
        raise ValueError(
            f"score={name_of(score)} has needs={score.needs!r}: give a tuple of {', '.join(map(repr, known))}, such as "
            "('gradient',)."
        )


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014) to int64, which wraps around."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right logically, because torch's `>>` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
