"""The passes over this rank's shards that a selection needs from a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsity.score import Score, key_spacing_bits
from sparsity.select.inside import Inside
from sparsity.shards import ParameterShard, chunks

SCORED_AT_ONCE = 1 << 13
"""Keys that a score computes at a time on a CPU: it needs several times their memory, and its time hardly matters."""


class Passes(ABC):
    """Passes over the local shards with the keys of one score. None is collective.

    It is itself an `Inside`, for ranges with too many keys to collect: it then reads all keys again in each method.
    """

    def __init__(self, shards: Sequence[ParameterShard], score: Score) -> None:
        self.shards = shards
        self.score = score
        self.device = shards[0].values.device
        self.spacing_bits = key_spacing_bits(shards, score)
        """The number of low bits that are 0 in every key."""

    def sample(self, stride: int) -> Tensor:
        """Return the keys int32 [n] of every `stride`-th local weight, counting through all shards."""
        starts, sizes = places_of_sample(self.shards, stride)
        keys = torch.empty(sum(sizes), dtype=torch.int32, device=self.device)
        filled = 0
        for shard, start, size in zip(self.shards, starts, sizes, strict=True):
            few = shard.every(start, stride)
            for part in chunks(size, keys.device, on_cpu=SCORED_AT_ONCE):
                keys[filled + part.start : filled + part.stop] = self.score(few, part)
            filled += size
        return keys

    @abstractmethod
    def collect(self, lo: int, hi: int, limit: int) -> tuple[int, int, Inside]:
        """Return how many keys are below `lo`, how many are in lo .. hi - 1, and those keys; at most `limit` are collected."""

    @abstractmethod
    def histogram_of_keys(self, keys: Tensor, lo: int, hi: int, shift: int) -> Tensor:
        """Return counts int64 [bins] of the keys lo .. hi - 1 among `keys`, int32 [n], in bins of 2^shift keys."""

    @abstractmethod
    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        """Return counts int64 [bins] of all shards' keys lo .. hi - 1, in bins of 2^shift keys."""

    @abstractmethod
    def num_equal(self, key: int) -> list[int]:
        """Return how many keys of each shard equal `key`."""

    @abstractmethod
    def keep_above_(self, keys: Mapping[int, int]) -> None:
        """Set the masks of the shards numbered in `keys`: keep the weights above the shard's key."""

    @abstractmethod
    def keep_after_ties_(self, number: int, key: int, num_dropped: int) -> None:
        """Set the mask of one shard: keep weights above `key`, and of the kept weights with this key all but the first
        `num_dropped`."""

    def find_bracket(self, keys: Tensor, ranks: tuple[int, int]) -> tuple[tuple[int, int], int, int] | None:
        """Find the range of a sample's keys from one rank to another, if the device can do so without the host.

        Returns:
            The range's first key and the one after its last, how many keys are below it, and how many in it; or None.
        """
        return None

    def collect_and_find(
        self, k: int, lo: int, hi: int, limit: int
    ) -> tuple[int, int, tuple[int, int, int] | None, Inside] | None:
        """Collect as `collect` does and find this rank's k-th smallest key, if the device can do so without the host.

        Returns:
            The number of keys below `lo`; the number in the range; the k-th smallest key with how many keys are below it and
            how many equal it, or None if it was not collected; and the collected keys. None if the device cannot.
        """
        return None


def places_of_sample(shards: Sequence[ParameterShard], stride: int) -> tuple[list[int], list[int]]:
    """Return the first weight of each shard in a sample, and how many weights it contributes."""
    starts, phase = [], 0
    for shard in shards:
        starts.append(phase)
        phase = (phase - shard.values.numel()) % stride
    sizes = [len(range(start, shard.values.numel(), stride)) for start, shard in zip(starts, shards, strict=True)]
    return starts, sizes
