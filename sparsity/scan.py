"""One pass over the local shards for a range of keys: how many lie below it, and what is inside.

Three ways to the same answer: numpy on a CPU, whose comparisons are twice as fast as torch's; Triton kernels on a GPU, for
magnitudes, each launched once for all shards (`sparsity.launches`); torch's own operations for everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsity.score import SIGN_OFF, Score, key_spacing_bits, magnitude
from sparsity.shards import ParameterShard, chunks, kernels_for, to_device

MOST_COUNTED = 64
"""Up to so many different keys in a range they are counted one by one and not collected."""


class Inside(Protocol):
    """This rank's keys of a range, in one of several forms; none of the methods is collective."""

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
        return histogram_of_keys(self.keys, lo, hi, shift)

    def num_equal(self, key: int) -> list[int]:
        if self.keys.device.type == "cpu":
            # Few places, and no sum beside each key.
            places = (self.keys == key).nonzero().view(-1)
            return torch.searchsorted(places, torch.tensor(self.starts)).diff().tolist()
        upto = torch.zeros(len(self.keys) + 1, dtype=torch.int32, device=self.keys.device)
        torch.cumsum(self.keys == key, dim=0, out=upto[1:])
        return upto.take(to_device(self.starts, upto.device)).diff().tolist()


@dataclass(frozen=True)
class Tagged:
    """The keys themselves, int32 [n] in no order, -1 in places left over; and the number of each one's shard, int16 or int32
    [n]."""

    keys: Tensor
    owners: Tensor
    num_shards: int

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        return histogram_of_keys(self.keys, lo, hi, shift)

    def num_equal(self, key: int) -> list[int]:
        counts = torch.zeros(self.num_shards, dtype=torch.int32, device=self.keys.device)
        return counts.index_add_(0, self.owners.int(), (self.keys == key).int()).tolist()


@dataclass(frozen=True)
class Counted:
    """`counts` int64 [shards, keys]: how often each shard has the key lo + (i << spacing_bits)."""

    counts: np.ndarray
    lo: int
    spacing_bits: int
    device: torch.device

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        counts = [0] * num_bins(lo, hi, shift)
        for index, count in enumerate(self.counts.sum(axis=0).tolist()):
            key = self.lo + (index << self.spacing_bits)
            if lo <= key < hi:
                counts[(key - lo) >> shift] += count
        return to_device(counts, self.device)

    def num_equal(self, key: int) -> list[int]:
        found: list[int] = self.counts[:, (key - self.lo) >> self.spacing_bits].tolist()
        return found


@dataclass(frozen=True)
class Streamed:
    """Not kept at all, where they were too many: each question reads all shards again."""

    shards: Sequence[ParameterShard]
    score: Score

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        if (launches := kernels_of(self.shards, self.score)) is not None:
            return launches.histogram_of_shards(self.shards, lo, hi, shift)
        parts = (
            self.score(shard, part)
            for shard in self.shards
            for part in chunks(shard.values.numel(), shard.values.device)
        )
        return histogram(parts, lo, hi, shift, self.shards[0].values.device)

    def num_equal(self, key: int) -> list[int]:
        if (launches := kernels_of(self.shards, self.score)) is not None:
            return launches.count_by_shard(self.shards, key, key + 1, 0)[1].view(-1).tolist()
        counts = torch.zeros(len(self.shards), dtype=torch.int64, device=self.shards[0].values.device)
        for number, shard in enumerate(self.shards):
            for part in chunks(shard.values.numel(), shard.values.device):
                counts[number] += torch.count_nonzero(self.score(shard, part) == key)
        return counts.tolist()


def kernels_of(shards: Sequence[ParameterShard], score: Score) -> ModuleType | None:
    """`sparsity.launches` if its kernels can rank these shards, else None."""
    return kernels_for(shards[0].values.device) if score is magnitude else None


def collect(shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int) -> tuple[int, int, Inside]:
    """Local keys below `lo`, local keys in lo .. hi - 1, and the latter themselves, no more than `limit` of them kept."""
    if (launches := kernels_of(shards, score)) is not None:
        return _collect_in_kernels(launches, shards, lo, hi, limit)
    if shards[0].values.device.type == "cpu":
        return _collect_on_cpu(shards, score, lo, hi, limit)
    return _collect_in_torch(shards, score, lo, hi, limit)


def keep_above_(shards: Sequence[ParameterShard], score: Score, keys: Sequence[int]) -> None:
    """Set the masks: in each shard keep what is above its key in `keys`."""
    if not shards:
        return
    if (launches := kernels_of(shards, score)) is not None:
        launches.keep_above_(shards, keys)
        return
    for shard, key in zip(shards, keys, strict=True):
        if shard.values.device.type == "cpu":
            on_cpu, mask = _Keys(shard, score), shard.mask.numpy()
            bound = on_cpu.bound(key)
            for part, chunk in on_cpu.chunks():
                np.greater(chunk, bound, out=mask[part])
        else:
            for part in chunks(shard.values.numel(), shard.values.device):
                torch.gt(score(shard, part), key, out=shard.mask[part])


def count_mask(shards: Sequence[ParameterShard]) -> Tensor:
    """Kept weights of each local shard, int64 [shards]."""
    if (launches := kernels_for(shards[0].mask.device)) is not None:
        return launches.count_kept(shards)
    return torch.stack([torch.count_nonzero(shard.mask) for shard in shards])


def keep_after_ties_(shard: ParameterShard, score: Score, key: int, num_dropped: int) -> None:
    """Set the mask of a shard in which `key` occurs: kept is what has a key above it, and of the weights with this very key
    that were kept so far all but the first `num_dropped`."""
    if (launches := kernels_of([shard], score)) is not None:
        launches.keep_after_ties_(shard, key, num_dropped)
        return
    if shard.values.device.type == "cpu":
        keys, mask = _Keys(shard, score), shard.mask.numpy()
        bound = keys.bound(key)
        for part, chunk in keys.chunks():
            tied = np.flatnonzero((chunk == bound) & mask[part])
            np.greater(chunk, bound, out=mask[part])
            mask[part][tied[num_dropped:]] = True
            num_dropped = max(0, num_dropped - len(tied))
        return
    _keep_after_ties_in_torch(shard, score, key, num_dropped)


def _keep_after_ties_in_torch(shard: ParameterShard, score: Score, key: int, num_dropped: int) -> None:
    num_before = torch.zeros(1, dtype=torch.int64, device=shard.values.device)
    for part in chunks(shard.values.numel(), shard.values.device):
        found = score(shard, part)
        is_tie = (found == key) & shard.mask[part]
        place = torch.cumsum(is_tie, dim=0) + num_before
        shard.mask[part] = (found > key) | (is_tie & (place > num_dropped))
        num_before = place[-1:]


def num_bins(lo: int, hi: int, shift: int) -> int:
    """Bins of 2^shift keys that hold the keys lo .. hi - 1."""
    return ((hi - lo - 1) >> shift) + 1


def histogram_of_keys(keys: Tensor, lo: int, hi: int, shift: int) -> Tensor:
    """`histogram` of keys int32 [n], on a GPU by one kernel."""
    if (launches := kernels_for(keys.device)) is not None:
        return launches.histogram_of_keys(keys, lo, hi, shift)
    parts = (keys[part] for part in chunks(len(keys), keys.device))
    return histogram(parts, lo, hi, shift, keys.device)


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
        return below, int(counts.sum()), Counted(counts, lo, spacing_bits, shards[0].values.device)

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


def _collect_in_kernels(
    launches: ModuleType, shards: Sequence[ParameterShard], lo: int, hi: int, limit: int
) -> tuple[int, int, Inside]:
    """All kernels run before the one look at their counts."""
    spacing_bits = key_spacing_bits(shards, magnitude)
    num_keys = num_bins(lo, hi, spacing_bits)
    if num_keys <= MOST_COUNTED:
        num_below, by_shard = launches.count_by_shard(shards, lo, hi, spacing_bits)
        below, *flat = torch.cat([num_below, by_shard.view(-1)]).tolist()
        counts = np.array(flat, dtype=np.int64).reshape(len(shards), num_keys)
        return below, int(counts.sum()), Counted(counts, lo, spacing_bits, by_shard.device)
    found, keys, owners = launches.collect(shards, lo, hi, limit)
    below, inside, lost = found.tolist()
    if lost:
        return below, inside, Streamed(shards, magnitude)
    return below, inside, Tagged(keys, owners, len(shards))


def _collect_in_torch(
    shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int
) -> tuple[int, int, Inside]:
    """As `_collect_in_kernels`, but the keys stay in order."""
    device = shards[0].values.device
    # One place more takes what is not collected: a boolean index would wait for the device at each chunk.
    keys = torch.empty(limit + 1, dtype=torch.int32, device=device)
    below, inside = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    starts = [inside]
    for shard in shards:
        for part in chunks(shard.values.numel(), device):
            found = score(shard, part)
            is_below = found < lo
            is_within = (found <= hi - 1) ^ is_below
            place = torch.cumsum(is_within, dim=0) + inside
            keys[torch.where(is_within & (place <= limit), place - 1, limit)] = found
            below, inside = below + torch.count_nonzero(is_below), place[-1:]
        starts.append(inside)
    num_below, *found_starts = torch.cat([below, *starts]).tolist()
    num_inside = found_starts[-1]
    if num_inside > limit:
        return num_below, num_inside, Streamed(shards, score)
    return num_below, num_inside, Collected(keys[:num_inside], found_starts)
