"""Passes in plain torch operations, for scores without a kernel and for devices without Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from sparsity.score import Score
from sparsity.select.histograms import histogram_in_torch
from sparsity.select.inside import Collected, Inside
from sparsity.select.passes import Passes
from sparsity.shards import ParameterShard, chunks


class TorchPasses(Passes):
    """Passes in torch; if `kernels` (`sparsity.launches`) is available, it counts keys that are already in memory."""

    def __init__(self, shards: Sequence[ParameterShard], score: Score, kernels: ModuleType | None = None) -> None:
        super().__init__(shards, score)
        self._kernels = kernels

    def collect(self, lo: int, hi: int, limit: int) -> tuple[int, int, Inside]:
        # An extra place takes keys that are not collected, because a boolean index would wait for the device at each chunk.
        keys = torch.empty(limit + 1, dtype=torch.int32, device=self.device)
        below = torch.zeros(1, dtype=torch.int64, device=self.device)
        inside = torch.zeros(1, dtype=torch.int64, device=self.device)
        starts = [inside]
        for shard in self.shards:
            for part in chunks(shard.values.numel(), self.device):
                found = self.score(shard, part)
                is_below = found < lo
                is_within = (found <= hi - 1) ^ is_below
                place = torch.cumsum(is_within, dim=0) + inside
                keys[torch.where(is_within & (place <= limit), place - 1, limit)] = found
                below, inside = below + torch.count_nonzero(is_below), place[-1:]
            starts.append(inside)
        num_below, *found_starts = torch.cat([below, *starts]).tolist()
        num_inside = found_starts[-1]
        if num_inside > limit:
            return num_below, num_inside, self
        return num_below, num_inside, Collected(keys[:num_inside], found_starts, self.histogram_of_keys)

    def histogram_of_keys(self, keys: Tensor, lo: int, hi: int, shift: int) -> Tensor:
        if self._kernels is not None:
            counts: Tensor = self._kernels.histogram_of_keys(keys, lo, hi, shift)
            return counts
        parts = (keys[part] for part in chunks(len(keys), keys.device))
        return histogram_in_torch(parts, lo, hi, shift, keys.device)

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        parts = (self.score(shard, part) for shard in self.shards for part in chunks(shard.values.numel(), self.device))
        return histogram_in_torch(parts, lo, hi, shift, self.device)

    def num_equal(self, key: int) -> list[int]:
        counts = torch.zeros(len(self.shards), dtype=torch.int64, device=self.device)
        for number, shard in enumerate(self.shards):
            for part in chunks(shard.values.numel(), self.device):
                counts[number] += torch.count_nonzero(self.score(shard, part) == key)
        return counts.tolist()

    def keep_above_(self, keys: Mapping[int, int]) -> None:
        for number, key in keys.items():
            shard = self.shards[number]
            for part in chunks(shard.values.numel(), self.device):
                torch.gt(self.score(shard, part), key, out=shard.mask[part])

    def keep_after_ties_(self, number: int, key: int, num_dropped: int) -> None:
        shard = self.shards[number]
        num_before = torch.zeros(1, dtype=torch.int64, device=self.device)
        for part in chunks(shard.values.numel(), self.device):
            found = self.score(shard, part)
            is_tie = (found == key) & shard.mask[part]
            place = torch.cumsum(is_tie, dim=0) + num_before
            shard.mask[part] = (found > key) | (is_tie & (place > num_dropped))
            num_before = place[-1:]
