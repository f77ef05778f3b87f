"""The exact k-th smallest key over all ranks, and the masks that follow from it.

Ranks exchange only counts of keys, so the traffic does not grow with the model: a few histograms, and for ties a count for
each parameter and each rank. The search (Floyd and Rivest 1975, in the key space of a radix sort) has these steps:

1. A sample gives a bracket, a range of keys that very likely holds the threshold.
2. One pass counts the keys below the bracket and collects the few keys inside it.
3. Histograms of the collected keys narrow the bracket to a single key.
4. A second pass writes the masks.

If the bracket misses the threshold, the search needs a few more passes and is still exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.mask import count_mask
from sparsity.score import NUM_KEY_BITS, Score, magnitude
from sparsity.select.device import passes_for
from sparsity.select.histograms import find_bin, find_bins
from sparsity.select.inside import Inside
from sparsity.select.passes import Passes
from sparsity.shards import ParameterShard, RankLayout

NUM_BIN_BITS = 12
SAMPLE_SIZE = 1 << 17
SAMPLE_SHARE = 1 / 256
"""Over all ranks, the sample has SAMPLE_SIZE keys, or takes this share of the weights' memory if that is more."""
SAMPLE_SIGMAS = 3.0
MIN_CANDIDATES = 1 << 12
CANDIDATE_SHARE = 1 / 32


@dataclass(frozen=True)
class _Range:
    """The keys lo .. hi - 1; `below` keys of all ranks are below lo."""

    lo: int
    hi: int
    below: int = 0


@dataclass(frozen=True)
class Threshold:
    """The result of a selection: keys below `key` are pruned, and `num_ties_pruned` of the `num_ties` keys equal to it."""

    key: int
    num_below: int
    num_ties: int
    num_ties_pruned: int


@torch.no_grad()
def prune_smallest_(
    shards: Sequence[ParameterShard], num_pruned: int, *, score: Score = magnitude, layout: RankLayout | None = None
) -> Threshold | None:
    """Set the masks so that exactly `num_pruned` weights of all shards are pruned: those with the smallest keys.

    Weights that are pruned already stay pruned and count. Ties are pruned in the order (parameter, flat index in the full
    tensor), so that the masks do not depend on the world size. Only the masks change.

    Collective: over the shard group; all ranks pass the same parameters in the same order.

    Args:
        shards: This rank's shards of the parameters that compete.
        num_pruned: The number of weights of the full parameters that are pruned afterwards.
        score: The score that ranks weights.
        layout: The ranks that hold the other shards; None if this rank holds all of them.

    Returns:
        The threshold, or None if nothing is to be pruned.

    Raises:
        ValueError: `num_pruned` is larger than the number of weights.
    """
    layout = layout or RankLayout()
    if not shards or num_pruned == 0:
        return None
    if num_pruned > (numel := sum(shard.full_numel for shard in shards)):
        raise ValueError(f"{num_pruned:,} of {numel:,} weights cannot be pruned: prune no more than there are.")
    passes = passes_for(shards, score)
    threshold, inside = _find_threshold(passes, num_pruned, layout)
    if threshold.num_ties_pruned == threshold.num_ties:
        passes.keep_above_(dict.fromkeys(range(len(shards)), threshold.key))
    else:
        _prune_some_ties(passes, num_pruned, threshold, inside, layout)
    return threshold


def _find_threshold(passes: Passes, k: int, layout: RankLayout) -> tuple[Threshold, Inside]:
    """Find the k-th smallest key of all shards, counted from 1, and this rank's keys of a range that holds it.

    Collective: over the shard group.
    """
    bracket, share = _sample_bracket(passes, k, layout)
    numel = sum(shard.values.numel() for shard in passes.shards)
    limit = min(numel, math.ceil(min(1.5 * share, CANDIDATE_SHARE) * numel) + MIN_CANDIDATES)
    at_once = passes.collect_and_find(k, bracket.lo, bracket.hi, limit) if layout.shard_group is None else None
    if at_once is not None:
        num_below, num_inside, found, inside = at_once
        if found is not None:
            key, below, num_ties = found
            return Threshold(key, below, num_ties, k - below), inside
    else:
        below, num_inside, inside = passes.collect(bracket.lo, bracket.hi, limit)
        num_below, num_inside = layout.sum_ints([below, num_inside], passes.device)
    if num_below < k <= num_below + num_inside:
        bracket = _Range(bracket.lo, bracket.hi, num_below)
    else:
        inside, is_low = passes, k <= num_below
        bracket = _Range(0, bracket.lo) if is_low else _Range(bracket.hi, 1 << NUM_KEY_BITS, num_below + num_inside)
    while True:
        shift = _bin_bits(bracket, passes.spacing_bits)
        counts = layout.sum_counts(inside.histogram(bracket.lo, bracket.hi, shift))
        bin_index, before, held = find_bin(counts, k - bracket.below)
        lo = bracket.lo + (bin_index << shift)
        bracket = _Range(lo, min(bracket.hi, lo + (1 << shift)), bracket.below + before)
        if shift == passes.spacing_bits:
            return Threshold(lo, bracket.below, held, k - bracket.below), inside


def share_ties(totals: Sequence[int], quota: int) -> tuple[int, int]:
    """Return the parameter in which a quota of ties is used up, and how many of its ties the quota covers."""
    for index, total in enumerate(totals):
        if quota <= total:
            return index, quota
        quota -= total
    raise AssertionError("more ties are to be pruned than there are")


def _bin_bits(bracket: _Range, spacing_bits: int) -> int:
    """Return log2 of the bins' width, so that 2^NUM_BIN_BITS bins cover the range and none is finer than the keys."""
    return max(spacing_bits, (bracket.hi - bracket.lo - 1).bit_length() - NUM_BIN_BITS)


def _sample_bracket(passes: Passes, k: int, layout: RankLayout) -> tuple[_Range, float]:
    """Find a range of keys that very likely holds the k-th smallest, and the share of the sample inside it.

    The sample is every n-th weight, with n odd so that it covers all columns. This needs no random generator. Patterns in
    the sample do no harm, because it affects only the cost, never the result.
    """
    shards = passes.shards
    numel = sum(shard.full_numel for shard in shards)
    share_of_memory = sum(shard.full_numel * shard.values.itemsize for shard in shards) * SAMPLE_SHARE
    keys = passes.sample(numel // max(SAMPLE_SIZE, math.ceil(share_of_memory / torch.int32.itemsize)) | 1)

    def count(bracket: _Range, shift: int) -> Tensor:
        return layout.sum_counts(passes.histogram_of_keys(keys, bracket.lo, bracket.hi, shift))

    bracket = _Range(0, 1 << NUM_KEY_BITS)
    shift = _bin_bits(bracket, passes.spacing_bits)
    size, share = layout.sum_ints([len(keys)], passes.device)[0], k / numel
    if size == 0:
        return bracket, 1.0
    slack = SAMPLE_SIGMAS * math.sqrt(size * share * (1 - share)) + 1
    ranks = max(1, math.floor(share * size - slack)), min(size, math.ceil(share * size + slack))
    at_once = passes.find_bracket(keys, ranks) if layout.shard_group is None else None
    if at_once is not None:
        (lo, hi), below, inside = at_once
        return _Range(lo, hi, below), inside / size
    counts = count(bracket, shift)
    for _ in range(2):
        (first, below, _), (last, before, held) = find_bins(counts, [rank - bracket.below for rank in ranks])
        inside = before + held - below
        lo = bracket.lo + (first << shift)
        bracket = _Range(lo, min(bracket.hi, bracket.lo + ((last + 1) << shift)), bracket.below + below)
        if shift == passes.spacing_bits:
            break
        shift = _bin_bits(bracket, passes.spacing_bits)
        counts = count(bracket, shift)
    return bracket, inside / size


def _prune_some_ties(passes: Passes, num_pruned: int, threshold: Threshold, inside: Inside, layout: RankLayout) -> None:
    """Set the masks if only the first of the keys equal to the threshold are pruned. Collective: over the shard group.

    Weights that are pruned already have the key 0. If that is the threshold, only the survivors count as ties.
    """
    ties, quota = inside.num_equal(threshold.key), threshold.num_ties_pruned
    if threshold.key == 0:
        kept = count_mask(passes.shards).tolist()
        pruned = [shard.mask.numel() - count for shard, count in zip(passes.shards, kept, strict=True)]
        ties = [tie - gone for tie, gone in zip(ties, pruned, strict=True)]
        quota = num_pruned - layout.sum_ints([sum(pruned)], passes.device)[0]
    quotas = _num_ties_dropped(ties, quota, layout, passes.device)
    keys = {}
    for number, (num_ties, num_dropped) in enumerate(zip(ties, quotas, strict=True)):
        if num_dropped == num_ties or (num_dropped == 0 and threshold.key > 0):
            keys[number] = threshold.key if num_dropped == num_ties else threshold.key - 1
        elif num_dropped > 0:
            passes.keep_after_ties_(number, threshold.key, num_dropped)
    passes.keep_above_(keys)


def _num_ties_dropped(ties: list[int], quota: int, layout: RankLayout, device: torch.device) -> list[int]:
    """Return how many ties of each local shard a quota over all ranks covers. Collective: over the shard group."""
    totals = layout.sum_ints(ties, device)
    last, quota = share_ties(totals, quota)
    before = sum(layout.gather_count(ties[last], device)[: layout.shard_rank])
    return [*ties[:last], min(max(0, quota - before), ties[last]), *[0] * (len(ties) - last - 1)]
