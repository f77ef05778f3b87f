"""One pass over the local shards for a range of keys: how many lie below it, and where those inside it are.

Three ways to the same answer: numpy on a CPU, whose comparisons are twice as fast as torch's; one Triton kernel a shard
on a GPU, for magnitudes; torch's own operations for everything else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsity.score import SIGN_OFF, Score, magnitude
from sparsity.shards import ParameterShard, chunks

Result = TypeVar("Result")


@dataclass(frozen=True)
class Candidates:
    """Local keys inside a range: `keys` int32 [n] and `index` [n], the place in the shard, shard after shard.

    Those of shard i are `starts[i]` .. `starts[i + 1]`; within a shard they have no order.
    """

    keys: Tensor
    index: Tensor
    starts: list[int]

    def of_shard(self, number: int) -> tuple[Tensor, Tensor]:
        part = slice(self.starts[number], self.starts[number + 1])
        return self.keys[part], self.index[part]

    def parts(self) -> Iterator[Tensor]:
        """The keys, as many at a time as a histogram of them can take without much memory."""
        for part in chunks(len(self.keys), self.keys.device):
            yield self.keys[part]


def collect(
    shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int
) -> tuple[int, int, Candidates | None]:
    """Local keys below `lo`, local keys in lo .. hi - 1, and the latter themselves unless they are more than `limit`."""
    device = shards[0].values.device
    if device.type == "cpu":
        return _collect_on_cpu(shards, score, lo, hi, limit)
    if score is magnitude and kernels() is not None:
        return _collect_on_gpu(shards, lo, hi, limit)
    return _collect_in_torch(shards, score, lo, hi, limit)


def keep_above_(shards: Sequence[ParameterShard], number: int, score: Score, key: int) -> None:
    """Set the mask of one shard: kept is what has a key above `key`."""
    shard = shards[number]
    if shard.values.device.type == "cpu":
        read, mask = _key_reader([shard], score), shard.mask.numpy()
        for _ in map_chunks(lambda _, part: np.greater(read(0, part), np.int32(key), out=mask[part]), [shard]):
            pass
    elif score is magnitude and kernels() is not None:
        kernels().keep_above_(shard.values, shard.mask, key)  # type: ignore[union-attr]
    else:
        for part in chunks(shard.values.numel(), shard.values.device):
            torch.gt(score(shard, part), key, out=shard.mask[part])


@cache
def kernels() -> ModuleType | None:
    """The Triton kernels, or None where Triton is not installed."""
    try:
        from sparsity import kernels as module
    except ImportError:
        return None
    return module


def map_chunks(function: Callable[[int, slice], Result], shards: Sequence[ParameterShard]) -> Iterator[Result]:
    """`function(number of the shard, slice)` of every chunk on the CPU, in order, on as many threads as torch has."""
    device = torch.device("cpu")
    pieces = [(number, part) for number, shard in enumerate(shards) for part in chunks(shard.values.numel(), device)]
    num_threads = min(torch.get_num_threads(), len(pieces))
    if num_threads <= 1:
        yield from (function(number, part) for number, part in pieces)
        return

    # A task takes a few chunks, so that handing it over costs little beside it.
    groups = [pieces[start : start + 8] for start in range(0, len(pieces), 8)]
    with ThreadPoolExecutor(num_threads) as pool:
        for results in pool.map(lambda group: [function(number, part) for number, part in group], groups):
            yield from results


def _key_reader(shards: Sequence[ParameterShard], score: Score) -> Callable[[int, slice], np.ndarray]:
    """A function that reads the keys of a chunk; the next call in the same thread may write over them."""
    own = threading.local()
    bits = [
        shard.values.numpy().view(np.int32) if score is magnitude and shard.values.dtype == torch.float32 else None
        for shard in shards
    ]

    def read(number: int, part: slice) -> np.ndarray:
        found = bits[number]
        if found is None:
            return score(shards[number], part).numpy()
        if not hasattr(own, "buffer"):
            own.buffer = np.empty(1 << 16, dtype=np.int32)
        return np.bitwise_and(found[part], np.int32(SIGN_OFF), out=own.buffer[: part.stop - part.start])

    return read


def _collect_on_cpu(
    shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int
) -> tuple[int, int, Candidates | None]:
    first, last = np.int32(lo), np.int32(hi - 1)
    read = _key_reader(shards, score)

    def scan(number: int, part: slice) -> tuple[int, int, int, np.ndarray, np.ndarray]:
        keys = read(number, part)
        within = keys >= first
        not_below = int(np.count_nonzero(within))
        np.not_equal(within, keys > last, out=within)
        index = np.flatnonzero(within)
        return number, len(keys) - not_below, part.start, index, keys[index]

    # Memory that is never written to takes no room.
    keys = np.empty(limit, dtype=np.int32)
    places = np.empty(limit, dtype=index_type(shards))
    counts, below, inside = np.zeros(len(shards) + 1, dtype=np.int64), 0, 0
    for number, num_below, start, index, found in map_chunks(scan, shards):
        below += num_below
        counts[number + 1] += len(found)
        if inside + len(found) <= limit:
            keys[inside : inside + len(found)] = found
            np.add(index, start, out=places[inside : inside + len(found)], casting="unsafe")
        inside += len(found)
    if inside > limit:
        return below, inside, None
    starts = np.cumsum(counts).tolist()
    return below, inside, Candidates(torch.from_numpy(keys[:inside]), torch.from_numpy(places[:inside]), starts)


def _collect_on_gpu(
    shards: Sequence[ParameterShard], lo: int, hi: int, limit: int
) -> tuple[int, int, Candidates | None]:
    """All kernels run before the one look at their counts."""
    device = shards[0].values.device
    keys = torch.empty(limit, dtype=torch.int32, device=device)
    index = torch.empty(limit, dtype=torch.int64 if index_type(shards) is np.int64 else torch.int32, device=device)
    starts = torch.zeros(len(shards) + 1, dtype=torch.int64, device=device)
    below = torch.zeros((), dtype=torch.int64, device=device)
    for number, shard in enumerate(shards):
        kernels().collect(shard.values, lo, hi, keys, index, starts[number : number + 2], below)  # type: ignore[union-attr]
    num_below, *found = torch.cat([below.view(1), starts]).tolist()
    if found[-1] > limit:
        return num_below, found[-1], None
    return num_below, found[-1], Candidates(keys[: found[-1]], index[: found[-1]], found)


def _collect_in_torch(
    shards: Sequence[ParameterShard], score: Score, lo: int, hi: int, limit: int
) -> tuple[int, int, Candidates | None]:
    device = shards[0].values.device
    below = torch.zeros((), dtype=torch.int64, device=device)
    keys, index, starts = [], [], [0]
    num_inside = 0
    for shard in shards:
        for part in chunks(shard.values.numel(), device):
            found = score(shard, part)
            under = found < lo
            below += torch.count_nonzero(under)
            place = ((found <= hi - 1) ^ under).nonzero().view(-1)
            num_inside += len(place)
            if num_inside <= limit:
                keys.append(found[place])
                index.append(place + part.start)
        starts.append(num_inside)
    if num_inside > limit or not keys:
        return int(below), num_inside, None
    return int(below), num_inside, Candidates(torch.cat(keys), torch.cat(index), starts)


def index_type(shards: Sequence[ParameterShard]) -> Any:
    return np.int32 if max(shard.values.numel() for shard in shards) < 1 << 31 else np.int64
