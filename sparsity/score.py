"""What ranks a weight: a score turns weights into integer keys, and the smallest keys are pruned first.

A key is an int32 of at least 0. Weights that were pruned before must have the key 0, so that they stay the smallest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsity.factors import factor_of
from sparsity.shards import ParameterShard

Score = Callable[[ParameterShard, slice], Tensor]
"""Keys [stop - start] of a slice of a shard's local elements."""
ScoreName = Literal["magnitude", "random"]

NUM_KEY_BITS = 31
SIGN_OFF = 0x7FFFFFFF


def magnitude(shard: ParameterShard, part: slice) -> Tensor:
    """The bits of |w| as float32: they have the order of |w|, denormals and infinities included; NaN comes last.

    bfloat16 and float16 widen to float32 exactly, so parameters of different types compare by value.
    """
    values = shard.values[part]
    if values.dtype == torch.float64:
        raise ValueError(
            f"{shard.name} is float64: magnitudes are compared as float32, bfloat16 or float16; convert it."
        )
    return values.float().view(torch.int32) & SIGN_OFF


def random(seed: int = 0) -> Score:
    """Keys that are a hash of (seed, name, flat index in the full tensor): the same for any world size."""

    def keys(shard: ParameterShard, part: slice) -> Tensor:
        digest = hashlib.blake2b(f"{seed}:{shard.name}".encode(), digest_size=8).digest()
        start = shard.offset + part.start
        index = torch.arange(start, start + part.stop - part.start, device=shard.values.device)
        bits = _mix(index + int.from_bytes(digest, "little", signed=True))
        kept = ((bits >> 33) & SIGN_OFF).clamp_(min=1)
        return kept.masked_fill_(~shard.mask[part], 0).to(torch.int32)

    return keys


def scaled(score: Score, factors: Mapping[str, float]) -> Score:
    """Return `score` with each parameter's keys, read as float32, multiplied by the factor of its name.

    A product is rounded once, to float32: its bits are the key. A power of two shifts the exponent exactly, unless the
    product is a denormal. Products that round to 0 or to infinity tie there. The same for any world size.

    Args:
        score: A score whose keys are the bits of float32 numbers, as those of `magnitude` are.
        factors: Name patterns and their factors, see `sparsity.factors`. Without any, `score` itself is returned.
    """
    if not factors:
        return score

    def keys(shard: ParameterShard, part: slice) -> Tensor:
        found, factor = score(shard, part), factor_of(shard.name, factors)
        return found if factor == 1 else (found.view(torch.float32) * factor).view(torch.int32)

    return keys


def score_named(name: ScoreName, seed: int = 0) -> Score:
    """The score of that name; `seed` is the random one's. Any other name is a ValueError."""
    if name not in get_args(ScoreName):
        raise ValueError(f"score={name} is not known: choose {' or '.join(get_args(ScoreName))}.")
    return magnitude if name == "magnitude" else random(seed)


def key_spacing_bits(shards: Sequence[ParameterShard], score: Score) -> int:
    """How many lower bits are 0 in every key: 16 where all magnitudes are bfloat16.

    Those of float16 would have 13, but torch widens its NaN to more than one pattern of bits.
    """
    is_narrow = score is magnitude and all(shard.values.dtype == torch.bfloat16 for shard in shards)
    return 16 if is_narrow else 0


def magnitude_of_key(key: int) -> float:
    """The |w| whose key this is."""
    return float(struct.unpack("<f", struct.pack("<I", key))[0])


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014) on int64, wrapping around."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's `>>` copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
