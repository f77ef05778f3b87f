"""Passes in Triton kernels, for magnitudes on a GPU: each is launched once for all shards (`sparsity.launches`).

If one rank has all weights, no counts are exchanged and the device can work without the host: `find_bracket` and
`collect_and_find` queue all their kernels before the host waits once. They find a key digit by digit from histograms, like a
radix sort, and the digits found so far stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsity.score import Score
from sparsity.select.histograms import num_bins
from sparsity.select.inside import MOST_COUNTED, Counted, Inside, Tagged
from sparsity.select.passes import Passes, places_of_sample
from sparsity.shards import ParameterShard

DIGIT_BITS = 12


class TritonPasses(Passes):
    """Passes that call the kernels in `launches`, the module `sparsity.launches`."""

    def __init__(self, shards: Sequence[ParameterShard], score: Score, launches: ModuleType) -> None:
        super().__init__(shards, score)
        self._launches = launches
        self._rows = launches.rows_of(shards)

    def sample(self, stride: int) -> Tensor:
        starts, sizes = places_of_sample(self.shards, stride)
        keys: Tensor = self._launches.sample(self.shards, starts, sizes, stride, rows=self._rows)
        return keys

    def collect(self, lo: int, hi: int, limit: int) -> tuple[int, int, Inside]:
        """Collect with one host sync: all kernels are queued before their counts are read."""
        num_keys = num_bins(lo, hi, self.spacing_bits)
        if num_keys <= MOST_COUNTED:
            num_below, by_shard = self._launches.count_by_shard(self.shards, lo, hi, self.spacing_bits, rows=self._rows)
            below, *flat = torch.cat([num_below, by_shard.view(-1)]).tolist()
            counts = np.array(flat, dtype=np.int64).reshape(len(self.shards), num_keys)
            return below, int(counts.sum()), Counted(counts, lo, self.spacing_bits, by_shard.device)
        found, keys, owners = self._launches.collect(self.shards, lo, hi, limit, rows=self._rows)
        below, inside, lost = found.tolist()
        return below, inside, self if lost else self._tagged(keys, owners)

    def histogram_of_keys(self, keys: Tensor, lo: int, hi: int, shift: int) -> Tensor:
        counts: Tensor = self._launches.histogram_of_keys(keys, lo, hi, shift)
        return counts

    def histogram(self, lo: int, hi: int, shift: int) -> Tensor:
        counts: Tensor = self._launches.histogram_of_shards(self.shards, lo, hi, shift, rows=self._rows)
        return counts

    def num_equal(self, key: int) -> list[int]:
        _, by_shard = self._launches.count_by_shard(self.shards, key, key + 1, 0, rows=self._rows)
        counts: list[int] = by_shard.view(-1).tolist()
        return counts

    def keep_above_(self, keys: Mapping[int, int]) -> None:
        if keys:
            shards, is_all = [self.shards[number] for number in keys], list(keys) == list(range(len(self.shards)))
            self._launches.keep_above_(shards, list(keys.values()), rows=self._rows if is_all else None)

    def keep_after_ties_(self, number: int, key: int, num_dropped: int) -> None:
        self._launches.keep_after_ties_(self.shards[number], key, num_dropped)

    def find_bracket(self, keys: Tensor, ranks: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
        wanted = torch.tensor(ranks, dtype=torch.int64).to(keys.device, non_blocking=True)
        found, shift = radix_select(self._launches, keys, 0, 1 << 31, wanted, self.spacing_bits, num_digits=2)
        (first, below, _), (last, before, held) = found.tolist()
        return (first << shift, (last + 1) << shift), below, before + held - below

    def collect_and_find(
        self, k: int, lo: int, hi: int, limit: int
    ) -> tuple[int, int, tuple[int, int, int] | None, Inside] | None:
        if num_bins(lo, hi, self.spacing_bits) <= MOST_COUNTED:
            return None
        counts, keys, owners = self._launches.collect(self.shards, lo, hi, limit, rows=self._rows)
        found, _ = radix_select(self._launches, keys, lo, hi, k - counts[:1], self.spacing_bits)
        below, num_inside, lost, offset, before, held = torch.cat([counts, found.view(-1)]).tolist()
        if lost:
            return below, num_inside, None, self
        inside = self._tagged(keys, owners)
        if not below < k <= below + num_inside:
            return below, num_inside, None, inside
        return below, num_inside, (lo + (offset << self.spacing_bits), below + before, held), inside

    def _tagged(self, keys: Tensor, owners: Tensor) -> Tagged:
        return Tagged(keys, owners, len(self.shards), self.histogram_of_keys)


def radix_select(
    launches: ModuleType,
    keys: Tensor,
    lo: int,
    hi: int,
    ranks: Tensor,
    spacing_bits: int,
    num_digits: int | None = None,
) -> tuple[Tensor, int]:
    """Find the keys of several ranks among the keys lo .. hi - 1, without waiting for the device.

    Args:
        launches: `sparsity.launches`.
        keys: int32 [n] in no order; keys outside the range are ignored.
        lo: The first key of the range.
        hi: The key after the last of the range.
        ranks: int64 [ranks] on the device, counted from 1. For a rank that is too small or too large, the bin is arbitrary.
        spacing_bits: The number of low bits that are 0 in every key.
        num_digits: The number of 12-bit digits after which to stop; None: continue until bins are single keys.

    Returns:
        int64 [ranks, 3] with the bin of each rank, the number of keys in lower bins and the number in it; and log2 of the
        bins' width.
    """
    shift = max((hi - lo - 1).bit_length(), spacing_bits)
    ranks, is_first = ranks.view(-1, 1), True
    prefixes = below = torch.zeros_like(ranks)
    while True:
        num_bits = min(DIGIT_BITS, shift - spacing_bits)
        shift -= num_bits
        # Before the first digit all ranks have the same prefix and need one histogram.
        counts = launches.count_digits(keys, lo, hi, shift, num_bits, prefixes[:1] if is_first else prefixes)
        counts, is_first = counts.expand(len(ranks), -1), False
        upto = counts.cumsum(dim=1)
        digits = torch.searchsorted(upto, ranks - below).clamp_(max=(1 << num_bits) - 1)
        held = counts.gather(1, digits)
        below = below + upto.gather(1, digits) - held
        prefixes = (prefixes << num_bits) + digits
        num_digits = num_digits and num_digits - 1
        if shift == spacing_bits or num_digits == 0:
            return torch.cat([prefixes, below, held], dim=1), shift
