"""One rank's keys inside a range, in the form that a pass returned them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsity.select.histograms import num_bins
from sparsity.shards import to_device

MOST_COUNTED = 64
"""If a range has at most this many different keys, they are counted and not collected."""
HistogramOfKeys = Callable[[Tensor, int, int, int], Tensor]
"""Function of keys int32 [n], lo, hi and shift: counts int64 [bins] of lo .. hi - 1 in bins of 2^shift keys."""


class Inside(Protocol):
    """This rank's keys inside a range. No method is collective."""

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        """Return counts int64 [bins] of the keys lo .. hi - 1, within the range, in bins of 2^shift keys."""

    def num_equal(self, key: int) -> list[int]:
        """Return how many keys of each shard equal `key`, which is in the range."""


@dataclass(frozen=True)
class Collected:
    """The keys themselves, int32 [n], shard after shard: shard i has the keys starts[i] .. starts[i + 1] - 1 of the list."""

    keys: Tensor
    starts: list[int]
    histogram_of_keys: HistogramOfKeys

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        return self.histogram_of_keys(self.keys, lo, hi, shift)

    def num_equal(self, key: int) -> list[int]:
        if self.keys.device.type == "cpu":
            # Keys equal to `key` are few, so listing them is cheaper than a running sum over all keys.
            places = (self.keys == key).nonzero().view(-1)
            return torch.searchsorted(places, torch.tensor(self.starts)).diff().tolist()
        upto = torch.zeros(len(self.keys) + 1, dtype=torch.int32, device=self.keys.device)
        torch.cumsum(self.keys == key, dim=0, out=upto[1:])
        return upto.take(to_device(self.starts, upto.device)).diff().tolist()


@dataclass(frozen=True)
class Tagged:
    """The keys themselves, int32 [n] in no order with -1 in unused places, and the number of each key's shard, int16 or
    int32 [n]."""

    keys: Tensor
    owners: Tensor
    num_shards: int
    histogram_of_keys: HistogramOfKeys

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        return self.histogram_of_keys(self.keys, lo, hi, shift)

    def num_equal(self, key: int) -> list[int]:
        counts = torch.zeros(self.num_shards, dtype=torch.int32, device=self.keys.device)
        return counts.index_add_(0, self.owners.int(), (self.keys == key).int()).tolist()


@dataclass(frozen=True)
class Counted:
    """The number of each key: `counts`[shard, i], int64, is how often a shard has the key lo + (i << spacing_bits)."""

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
