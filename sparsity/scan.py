"""One pass over the local shards for a range of keys: how many lie below it, and what is inside.

Three ways to the same answer: numpy on a CPU, whose comparisons are twice as fast as torch's; one Triton kernel a shard
on a GPU, for magnitudes; torch's own operations for everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsity.score import SIGN_OFF, Score, key_spacing_bits, magnitude
from sparsity.shards import ParameterShard, chunks

MOST_COUNTED = 64
"""Up to so many different keys in a range they are counted one by one and not collected."""


class Inside(Protocol):
    """This rank's keys of a range, in one of three forms; none of the methods is collective."""

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        """Counts int64 [number of bins] of the keys lo .. hi - 1, within the range, in bins of 2^shift keys."""

    def num_equal(self, key: int) -> list[int]:
        """How many keys of each shard are `key`, which is in the range."""


@dataclass(frozen=True)
class Collected:
    """The keys themselves, int32 [n], shard after shard: those of shard i are starts[i] .. starts[i + 1]."""

    keys: Tensor
    starts: list[int]

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        parts = (self.keys[part] for part in chunks(len(self.keys), self.keys.device))
        return histogram(parts, lo, hi, shift, self.keys.device)

    def num_equal(self, key: int) -> list[int]:
        places = (self.keys == key).nonzero().view(-1)
        return torch.searchsorted(places, torch.tensor(self.starts, device=places.device)).diff().tolist()


@dataclass(frozen=True)
class Counted:
    """`counts` int64 [shards, keys]: how often each shard has the key lo + (i << spacing_bits)."""

    counts: np.ndarray
    lo: int
    spacing_bits: int

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        counts = torch.zeros(num_bins(lo, hi, shift), dtype=torch.int64)
        for index, count in enumerate(self.counts.sum(axis=0).tolist()):
            key = self.lo + (index << self.spacing_bits)
            if lo <= key < hi:
                counts[(key - lo) >> shift] += count
        return counts

    def num_equal(self, key: int) -> list[int]:
        found: list[int] = self.counts[:, (key - self.lo) >> self.spacing_bits].tolist()
        return found


@dataclass(frozen=True)
class Streamed:
    """Not kept at all, where they were too many: each question reads all shards again."""

    shards: Sequence[ParameterShard]
    score: Score

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        parts = (
            self.score(shard, part)
            for shard in self.shards
            for part in chunks(shard.values.numel(), shard.values.device)
        )
        return histogram(parts, lo, hi, shift, self.shards[0].values.device)

    def num_equal(self, key: int) -> list[int]:
        return [
            sum(
                int(torch.count_nonzero(self.score(shard, part) == key))
                for part in chunks(shard.values.numel(), shard.values.device)
            )
            for shard in self.shards
        ]


def collect(shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int) -> tuple[int, int, Inside]:
    """Local keys below `lo`, local keys in lo .. hi - 1, and the latter themselves, no more than `limit` of them kept."""
    device = shards[0].values.device
    if device.type == "cpu":
        return _collect_on_cpu(shards, score, lo, hi, limit)
    if score is magnitude and kernels() is not None:
        return _collect_on_gpu(shards, lo, hi, limit)
    return _collect_in_torch(shards, score, lo, hi, limit)


def keep_above_(shard: ParameterShard, score: Score, key: int) -> None:
    """Set the mask of a shard: kept is what has a key above `key`."""
    if shard.values.device.type == "cpu":
        keys, mask = _Keys(shard, score), shard.mask.numpy()
        bound = keys.bound(key)
        for part, chunk in keys.chunks():
            np.greater(chunk, bound, out=mask[part])
    elif score is magnitude and kernels() is not None:
        kernels().keep_above_(shard.values, shard.mask, key)  # type: ignore[union-attr]
    else:
        for part in chunks(shard.values.numel(), shard.values.device):
            torch.gt(score(shard, part), key, out=shard.mask[part])


def keep_after_ties_(shard: ParameterShard, score: Score, key: int, num_dropped: int) -> None:
    """Set the mask of a shard in which `key` occurs: kept is what has a key above it, and of the weights with this very key
    that were kept so far all but the first `num_dropped`."""
    if shard.values.device.type == "cpu":
        keys, mask = _Keys(shard, score), shard.mask.numpy()
        bound = keys.bound(key)
        for part, chunk in keys.chunks():
            tied = np.flatnonzero((chunk == bound) & mask[part])
            np.greater(chunk, bound, out=mask[part])
            mask[part][tied[num_dropped:]] = True
            num_dropped = max(0, num_dropped - len(tied))
        return
    for part in chunks(shard.values.numel(), shard.values.device):
        found = score(shard, part)
        keep = found > key
        places = ((found == key) & shard.mask[part]).nonzero().view(-1)
        keep[places[num_dropped:]] = True
        num_dropped = max(0, num_dropped - len(places))
        shard.mask[part] = keep


@cache
def kernels() -> ModuleType | None:
    """The Triton kernels, or None where Triton is not installed."""
    try:
        from sparsity import kernels as module
    except ImportError:
        return None
    return module


def num_bins(lo: int, hi: int, shift: int) -> int:
    """Bins of 2^shift keys that hold the keys lo .. hi - 1."""
    return ((hi - lo - 1) >> shift) + 1


def histogram(keys: Iterable[Tensor], lo: int, hi: int, shift: int, device: torch.device) -> Tensor:
    """Counts int64 [number of bins] of the keys lo .. hi - 1, in bins of 2^shift keys."""
    size = num_bins(lo, hi, shift)
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    for part in keys:
        if device.type == "cpu":
            # numpy counts int64, so a few at a time; hi can be 2^31, which an int32 would wrap.
            for few in part.split(1 << 14):
                found = few.numpy()
                found = found[(found >= np.int32(lo)) & (found <= np.int32(hi - 1))]
                counts += torch.from_numpy(np.bincount((found - np.int32(lo)) >> shift, minlength=size))
        else:
            # torch.bincount and a boolean index would wait for the device; a last bin takes what is outside instead.
            is_inside = (part >= lo) & (part <= hi - 1)
            bins = torch.where(is_inside, (part.long() - lo) >> shift, size)
            counted = torch.zeros(size + 1, dtype=torch.int64, device=device)
            counts += counted.scatter_add_(0, bins, torch.ones_like(bins))[:size]
    return counts


class _Keys:
    """A shard's keys on a CPU, read by numpy in chunks: magnitudes of float32 and bfloat16 from the weights' own bits.

    Of a bfloat16's key only the upper 16 bits can be set, so its chunks are int16, half as many bytes: they leave out the
    lower `shift` bits, and a key is above a bound where its upper bits are above the bound's.
    """

    def __init__(self, shard: ParameterShard, score: Score) -> None:
        self._shard, self._score = shard, score
        as_bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16} if score is magnitude else {}
        dtype = as_bits.get(shard.values.dtype)
        self._bits = shard.values.view(dtype).numpy() if dtype else None
        self.shift = 16 if dtype == torch.int16 else 0

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Where each chunk lies, and its keys >> shift, which the next one may write over."""
        device = self._shard.values.device
        if self._bits is None:
            for part in chunks(self._shard.values.numel(), device):
                yield part, self._score(self._shard, part).numpy()
            return
        buffer, no_sign = None, self._bits.dtype.type(SIGN_OFF >> self.shift)
        for part in chunks(self._shard.values.numel(), device):
            bits = self._bits[part]
            buffer = np.empty_like(bits) if buffer is None else buffer[: len(bits)]
            yield part, np.bitwise_and(bits, no_sign, out=buffer)

    def bound(self, key: int) -> np.integer:
        """`key`, -1 included, in the type and scale of the chunks, which `chunk > bound` compares with it."""
        return np.int16(key >> 16) if self.shift else np.int32(key)


def _collect_on_cpu(
    shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int
) -> tuple[int, int, Inside]:
    spacing_bits = key_spacing_bits(shards, score)
    num_keys = num_bins(lo, hi, spacing_bits)
    if num_keys <= MOST_COUNTED:
        counts, below = np.zeros((len(shards), num_keys), dtype=np.int64), 0
        for number, shard in enumerate(shards):
            for num_below, found in _scan(shard, score, lo, hi):
                below += num_below
                counts[number] += np.bincount((found - np.int32(lo)) >> spacing_bits, minlength=num_keys)
        return below, int(counts.sum()), Counted(counts, lo, spacing_bits)

    # Memory that is never written to takes no room.
    keys, starts, below, inside = np.empty(limit, dtype=np.int32), [0], 0, 0
    for shard in shards:
        for num_below, found in _scan(shard, score, lo, hi):
            below += num_below
            if inside + len(found) <= limit:
                keys[inside : inside + len(found)] = found
            inside += len(found)
        starts.append(inside)
    if inside > limit:
        return below, inside, Streamed(shards, score)
    return below, inside, Collected(torch.from_numpy(keys[:inside]), starts)


def _scan(shard: ParameterShard, score: Score, lo: int, hi: int) -> Iterator[tuple[int, np.ndarray]]:
    """Of each chunk on a CPU how many keys lie below `lo`, and the keys lo .. hi - 1."""
    keys = _Keys(shard, score)
    below, last = keys.bound(lo - 1), keys.bound(hi - 1)
    for _, chunk in keys.chunks():
        within = chunk > below
        not_below = int(np.count_nonzero(within))
        np.not_equal(within, chunk > last, out=within)
        yield len(chunk) - not_below, chunk[np.flatnonzero(within)].astype(np.int32) << keys.shift


def _collect_on_gpu(shards: Sequence[ParameterShard], lo: int, hi: int, limit: int) -> tuple[int, int, Inside]:
    """All kernels run before the one look at their counts."""
    device = shards[0].values.device
    keys = torch.empty(limit, dtype=torch.int32, device=device)
    starts = torch.zeros(len(shards) + 1, dtype=torch.int64, device=device)
    below = torch.zeros((), dtype=torch.int64, device=device)
    for number, shard in enumerate(shards):
        kernels().collect(shard.values, lo, hi, keys, starts[number : number + 2], below)  # type: ignore[union-attr]
    num_below, *found = torch.cat([below.view(1), starts]).tolist()
    if found[-1] > limit:
        return num_below, found[-1], Streamed(shards, magnitude)
    return num_below, found[-1], Collected(keys[: found[-1]], found)


def _collect_in_torch(
    shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int
) -> tuple[int, int, Inside]:
    device = shards[0].values.device
    below = torch.zeros((), dtype=torch.int64, device=device)
    keys, starts, inside = [torch.empty(0, dtype=torch.int32, device=device)], [0], 0
    for shard in shards:
        for part in chunks(shard.values.numel(), device):
            found = score(shard, part)
            under = found < lo
            below += torch.count_nonzero(under)
            found = found[(found <= hi - 1) ^ under]
            inside += len(found)
            if inside <= limit:
                keys.append(found)
        starts.append(inside)
    if inside > limit:
        return int(below), inside, Streamed(shards, score)
    return int(below), inside, Collected(torch.cat(keys), starts)
