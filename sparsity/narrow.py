"""The selection's looks at the device, all passes of which are queued before the host waits: for GPUs and one rank's weights.

Histograms find a key digit by digit, as a radix sort would. Each needs the digits found so far, which stay on the device, so
that neither the sample nor the collected keys make the host wait for every digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from sparsity.scan import Inside, Streamed, Tagged
from sparsity.score import magnitude
from sparsity.shards import ParameterShard

DIGIT_BITS = 12


def find_bracket(
    launches: ModuleType, keys: Tensor, ranks: tuple[int, int], spacing_bits: int
) -> tuple[tuple[int, int], int, int]:
    """Find a range of keys from the one of the first rank to that of the second, with one host sync.

    Args:
        keys: A sample, int32 [n], multiples of 2^spacing_bits.
        ranks: Two places in their order, from 1.

    Returns: the range's first key and the one after its last, how many keys of the sample are below it, and how many in it.
    """
    wanted = torch.tensor(ranks, dtype=torch.int64).to(keys.device, non_blocking=True)
    found, shift = radix_select(launches, keys, 0, 1 << 31, wanted, spacing_bits, num_digits=2)
    (first, below, _), (last, before, held) = found.tolist()
    return (first << shift, (last + 1) << shift), below, before + held - below


def collect_and_find(
    launches: ModuleType, shards: Sequence[ParameterShard], k: int, lo: int, hi: int, limit: int, spacing_bits: int
) -> tuple[int, int, tuple[int, int, int] | None, Inside]:
    """Collect the keys lo .. hi - 1 and find the k-th smallest of all among them, with one host sync.

    Returns: the number of keys below `lo`; of those in the range; the k-th smallest key, how many are below it and how many
    equal it, or None if it is not among the keys collected; and these keys.
    """
    counts, keys, owners = launches.collect(shards, lo, hi, limit)
    found, _ = radix_select(launches, keys, lo, hi, k - counts[:1], spacing_bits)
    below, num_inside, lost, offset, before, held = torch.cat([counts, found.view(-1)]).tolist()
    if lost:
        return below, num_inside, None, Streamed(shards, magnitude)
    inside = Tagged(keys, owners, len(shards))
    if not below < k <= below + num_inside:
        return below, num_inside, None, inside
    return below, num_inside, (lo + (offset << spacing_bits), below + before, held), inside


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
        keys: int32 [n] in no order; others than those of the range don't count.
        ranks: int64 [ranks] on the device, from 1. Those that are too small or large find any bin.
        num_digits: Stop after so many digits of 12 bits; without it the bins are single keys.

    Returns: int64 [ranks, 3] of each rank's bin, the keys in lower bins and those in it; and the bits of a bin's width.
    """
    shift = max((hi - lo - 1).bit_length(), spacing_bits)
    ranks = ranks.view(-1, 1)
    prefixes = below = torch.zeros_like(ranks)
    while True:
        num_bits = min(DIGIT_BITS, shift - spacing_bits)
        shift -= num_bits
        counts = launches.count_digits(keys, lo, hi, shift, num_bits, prefixes)
        upto = counts.cumsum(dim=1)
        digits = torch.searchsorted(upto, ranks - below).clamp_(max=(1 << num_bits) - 1)
        held = counts.gather(1, digits)
        below = below + upto.gather(1, digits) - held
        prefixes = (prefixes << num_bits) + digits
        num_digits = num_digits and num_digits - 1
        if shift == spacing_bits or num_digits == 0:
            return torch.cat([prefixes, below, held], dim=1), shift
