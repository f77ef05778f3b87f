"""The smallest keys of all shards: exact, with no gather of weights and no sort.

Every key lies on some rank; what crosses ranks are counts of keys, so the traffic does not grow with the model's weights:
it is a few histograms, and for ties a count of each parameter and of each rank. A sample brackets the threshold; one pass
counts what lies below the bracket and collects the few keys inside it; histograms of those narrow the bracket to a single
key; a second pass writes the masks (Floyd and Rivest 1975, in the key space of a radix sort). A bracket that misses costs
a few more passes and never the exactness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sparsity.narrow import collect_and_find, find_bracket
from sparsity.scan import (
    MOST_COUNTED,
    Inside,
    Streamed,
    collect,
    count_mask,
    histogram_of_keys,
    keep_above_,
    keep_after_ties_,
    kernels_of,
    num_bins,
)
from sparsity.score import NUM_KEY_BITS, Score, key_spacing_bits, magnitude
from sparsity.shards import ParameterShard, RankLayout, chunks, to_device

NUM_BIN_BITS = 12
SAMPLE_SIZE = 1 << 17
SAMPLE_SHARE = 1 / 256
"""The sample is so many keys, or so much of the weights' memory where that is more, over all ranks."""
SAMPLE_SIGMAS = 3.0
MIN_CANDIDATES = 1 << 12
CANDIDATE_SHARE = 1 / 32
SCORED_AT_ONCE = 1 << 13
"""Keys that a score makes at a time on a CPU, where it takes several times their memory and time hardly matters."""


@dataclass(frozen=True)
class _Range:
    """Keys lo .. hi - 1, with `below` keys of all ranks under lo."""

    lo: int
    hi: int
    below: int = 0


@dataclass(frozen=True)
class Threshold:
    """Pruned is every key below `key`, and `num_ties_pruned` of the `num_ties` keys equal to it."""

    key: int
    num_below: int
    num_ties: int
    num_ties_pruned: int


@torch.no_grad()
def prune_smallest_(
    shards: Sequence[ParameterShard], num_pruned: int, *, score: Score = magnitude, layout: RankLayout | None = None
) -> Threshold | None:
    """Set the masks so that exactly `num_pruned` weights of all shards are pruned: those with the smallest keys.

    Weights pruned before stay pruned and are counted; ties go in the order (parameter, flat index in the full tensor),
    so that the masks do not depend on the world size. Changes the masks alone. Collective over the shard group: every
    rank calls it with the same parameters in the same order. Returns None where nothing is to be pruned.
    """
    layout = layout or RankLayout()
    if not shards or num_pruned == 0:
        return None
    if num_pruned > (numel := sum(shard.full_numel for shard in shards)):
        raise ValueError(f"{num_pruned:,} of {numel:,} weights cannot be pruned: prune no more than there are.")
    threshold, inside = _find_threshold(shards, num_pruned, score, layout)
    if threshold.num_ties_pruned == threshold.num_ties:
        keep_above_(shards, score, [threshold.key] * len(shards))
    else:
        _prune_some_ties(shards, num_pruned, threshold, inside, score, layout)
    return threshold


def _find_threshold(
    shards: Sequence[ParameterShard], k: int, score: Score, layout: RankLayout
) -> tuple[Threshold, Inside]:
    """The k-th smallest key of all shards, counted from 1, and this rank's keys of a range that holds it.

    Collective over the shard group.
    """
    device, spacing_bits = shards[0].values.device, key_spacing_bits(shards, score)
    bracket, share = _sample_bracket(shards, k, score, layout, spacing_bits)
    numel = sum(shard.values.numel() for shard in shards)
    limit = min(numel, math.ceil(min(1.5 * share, CANDIDATE_SHARE) * numel) + MIN_CANDIDATES)
    launches = _kernels_of_one_rank(shards, score, layout)
    if launches is not None and num_bins(bracket.lo, bracket.hi, spacing_bits) > MOST_COUNTED:
        num_below, num_inside, found, inside = collect_and_find(
            launches, shards, k, bracket.lo, bracket.hi, limit, spacing_bits
        )
        if found is not None:
            key, below, num_ties = found
            return Threshold(key, below, num_ties, k - below), inside
    else:
        below, num_inside, inside = collect(shards, score, bracket.lo, bracket.hi, limit)
        num_below, num_inside = layout.sum_ints([below, num_inside], device)
    if num_below < k <= num_below + num_inside:
        bracket = _Range(bracket.lo, bracket.hi, num_below)
    else:
        inside, is_low = Streamed(shards, score), k <= num_below
        bracket = _Range(0, bracket.lo) if is_low else _Range(bracket.hi, 1 << NUM_KEY_BITS, num_below + num_inside)
    while True:
        shift = _bin_bits(bracket, spacing_bits)
        counts = layout.sum_counts(inside.histogram(bracket.lo, bracket.hi, shift))
        bin_index, before, held = find_bin(counts, k - bracket.below)
        lo = bracket.lo + (bin_index << shift)
        bracket = _Range(lo, min(bracket.hi, lo + (1 << shift)), bracket.below + before)
        if shift == spacing_bits:
            return Threshold(lo, bracket.below, held, k - bracket.below), inside


def _kernels_of_one_rank(shards: Sequence[ParameterShard], score: Score, layout: RankLayout) -> ModuleType | None:
    """`sparsity.launches` if its kernels can rank these shards and no counts are to be summed over ranks, else None."""
    return kernels_of(shards, score) if layout.shard_group is None else None


def find_bin(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """Find the bin that holds the `rank`-th element, from 1.

    Returns: the bin, how many elements are in bins before it, and how many in it.
    """
    return find_bins(counts, [rank])[0]


def find_bins(counts: Tensor, ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """`find_bin` of each of `ranks`, with one host sync for all."""
    upto = torch.cumsum(counts, dim=0)
    index = torch.searchsorted(upto, to_device(ranks, counts.device))
    # A tensor of no dimensions as an index would be read by the host: take reads it on the device.
    found = torch.stack([index, counts.take(index), upto.take(index)], dim=1).tolist()
    return [(bin_index, last - held, held) for bin_index, held, last in found]


def share_ties(totals: Sequence[int], quota: int) -> tuple[int, int]:
    """The parameter in which a quota of ties runs out, and how many of its ties the quota still covers."""
    for index, total in enumerate(totals):
        if quota <= total:
            return index, quota
        quota -= total
    raise AssertionError("more ties are to be pruned than there are")


def _bin_bits(bracket: _Range, spacing_bits: int) -> int:
    """The bits of a bin's width: 2^NUM_BIN_BITS bins cover the range, none finer than the keys."""
    return max(spacing_bits, (bracket.hi - bracket.lo - 1).bit_length() - NUM_BIN_BITS)


def _sample_bracket(
    shards: Sequence[ParameterShard], k: int, score: Score, layout: RankLayout, spacing_bits: int
) -> tuple[_Range, float]:
    """A range of keys that very likely holds the k-th smallest, and the share of the sample inside it.

    The sample is every n-th weight, n odd so that it wanders over the columns: it needs no generator, and as it decides
    the cost alone, never the result, its patterns do no harm.
    """
    device = shards[0].values.device
    numel = sum(shard.full_numel for shard in shards)
    share_of_memory = sum(shard.full_numel * shard.values.itemsize for shard in shards) * SAMPLE_SHARE
    keys = _sample(shards, numel // max(SAMPLE_SIZE, math.ceil(share_of_memory / torch.int32.itemsize)) | 1, score)

    def count(bracket: _Range, shift: int) -> Tensor:
        return layout.sum_counts(histogram_of_keys(keys, bracket.lo, bracket.hi, shift))

    bracket = _Range(0, 1 << NUM_KEY_BITS)
    shift = _bin_bits(bracket, spacing_bits)
    size, share = layout.sum_ints([len(keys)], device)[0], k / numel
    if size == 0:
        return bracket, 1.0
    slack = SAMPLE_SIGMAS * math.sqrt(size * share * (1 - share)) + 1
    ranks = max(1, math.floor(share * size - slack)), min(size, math.ceil(share * size + slack))
    if (launches := _kernels_of_one_rank(shards, score, layout)) is not None:
        (lo, hi), below, inside = find_bracket(launches, keys, ranks, spacing_bits)
        return _Range(lo, hi, below), inside / size
    counts = count(bracket, shift)
    for _ in range(2):
        (first, below, _), (last, before, held) = find_bins(counts, [rank - bracket.below for rank in ranks])
        inside = before + held - below
        lo = bracket.lo + (first << shift)
        bracket = _Range(lo, min(bracket.hi, bracket.lo + ((last + 1) << shift)), bracket.below + below)
        if shift == spacing_bits:
            break
        shift = _bin_bits(bracket, spacing_bits)
        counts = count(bracket, shift)
    return bracket, inside / size


def _sample(shards: Sequence[ParameterShard], stride: int, score: Score) -> Tensor:
    """The keys of every `stride`-th local weight, counted through all shards."""
    starts, phase = [], 0
    for shard in shards:
        starts.append(phase)
        phase = (phase - shard.values.numel()) % stride
    sizes = [len(range(start, shard.values.numel(), stride)) for start, shard in zip(starts, shards, strict=True)]
    if (launches := kernels_of(shards, score)) is not None:
        return launches.sample(shards, starts, sizes, stride)
    keys = torch.empty(sum(sizes), dtype=torch.int32, device=shards[0].values.device)
    filled = 0
    for shard, start, size in zip(shards, starts, sizes, strict=True):
        values, mask = shard.values[start::stride], shard.mask[start::stride]
        few = ParameterShard(shard.name, values, mask, shard.offset, shard.full_numel)
        for part in chunks(size, keys.device, on_cpu=SCORED_AT_ONCE):
            keys[filled + part.start : filled + part.stop] = score(few, part)
        filled += size
    return keys


def _prune_some_ties(
    shards: Sequence[ParameterShard],
    num_pruned: int,
    threshold: Threshold,
    inside: Inside,
    score: Score,
    layout: RankLayout,
) -> None:
    """Set the masks where only the first of the keys equal to the threshold are pruned. Collective over the shard group.

    A key of 0 can be that of weights pruned before: there the ties that the quota is for are the survivors among them.
    """
    ties, quota = inside.num_equal(threshold.key), threshold.num_ties_pruned
    if threshold.key == 0:
        kept = count_mask(shards).tolist()
        pruned = [shard.mask.numel() - count for shard, count in zip(shards, kept, strict=True)]
        ties = [tie - gone for tie, gone in zip(ties, pruned, strict=True)]
        quota = num_pruned - layout.sum_ints([sum(pruned)], shards[0].values.device)[0]
    quotas = _num_ties_dropped(ties, quota, layout, shards[0].values.device)
    whole, keys = [], []
    for shard, num_ties, num_dropped in zip(shards, ties, quotas, strict=True):
        if num_dropped == num_ties or (num_dropped == 0 and threshold.key > 0):
            whole.append(shard)
            keys.append(threshold.key if num_dropped == num_ties else threshold.key - 1)
        elif num_dropped > 0:
            keep_after_ties_(shard, score, threshold.key, num_dropped)
    keep_above_(whole, score, keys)


def _num_ties_dropped(ties: list[int], quota: int, layout: RankLayout, device: torch.device) -> list[int]:
    """How many of each local shard's ties a quota over all ranks covers. Collective over the shard group."""
    totals = layout.sum_ints(ties, device)
    last, quota = share_ties(totals, quota)
    before = sum(layout.gather_count(ties[last], device)[: layout.shard_rank])
    return [*ties[:last], min(max(0, quota - before), ties[last]), *[0] * (len(ties) - last - 1)]
