"""Histograms of keys, and the bins that contain given ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from sparsity.shards import to_device


def num_bins(lo: int, hi: int, shift: int) -> int:
    """Return how many bins of 2^shift keys hold the keys lo .. hi - 1."""
    return ((hi - lo - 1) >> shift) + 1


def histogram_in_numpy(keys: Iterable[Tensor], lo: int, hi: int, shift: int) -> Tensor:
    """Return counts int64 [bins] of the keys lo .. hi - 1 on the CPU, in bins of 2^shift keys."""
    size = num_bins(lo, hi, shift)
    counts = torch.zeros(size, dtype=torch.int64)
    for part in keys:
        # numpy converts to int64 to count, so take a few at a time. hi can be 2^31, which overflows int32, hence hi - 1.
        for few in part.split(1 << 14):
            found = few.numpy()
            found = found[(found >= np.int32(lo)) & (found <= np.int32(hi - 1))]
            counts += torch.from_numpy(np.bincount((found - np.int32(lo)) >> shift, minlength=size))
    return counts


def histogram_in_torch(keys: Iterable[Tensor], lo: int, hi: int, shift: int, device: torch.device) -> Tensor:
    """Return counts int64 [bins] of the keys lo .. hi - 1 on `device`, in bins of 2^shift keys."""
    size = num_bins(lo, hi, shift)
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    for part in keys:
        # torch.bincount and a boolean index would wait for the device, so an extra last bin takes keys outside the range.
        is_inside = (part >= lo) & (part <= hi - 1)
        bins = torch.where(is_inside, (part.long() - lo) >> shift, size)
        counted = torch.zeros(size + 1, dtype=torch.int64, device=device)
        counts += counted.scatter_add_(0, bins, torch.ones_like(bins))[:size]
    return counts


def find_bin(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """Find the bin that holds the `rank`-th element, counted from 1.

    Returns:
        The bin, the number of elements in bins before it, and the number in it.
    """
    return find_bins(counts, [rank])[0]


def find_bins(counts: Tensor, ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the result of `find_bin` for each of `ranks`, with one host sync for all."""
    upto = torch.cumsum(counts, dim=0)
    index = torch.searchsorted(upto, to_device(ranks, counts.device))
    # Indexing with a zero-dimensional tensor would make the host read it; take reads it on the device.
    found = torch.stack([index, counts.take(index), upto.take(index)], dim=1).tolist()
    return [(bin_index, last - held, held) for bin_index, held, last in found]
