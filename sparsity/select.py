"""The smallest keys of all shards: exact, with no gather of weights and no sort.

Every key lies on some rank; what crosses ranks are counts of keys, so the traffic does not grow with the model. A sample
brackets the threshold; one pass counts what lies below the bracket and collects the few keys inside it; histograms of
those narrow the bracket to a single key; a second pass writes the masks (Floyd and Rivest 1975, in the key space of a
radix sort). A bracket that misses costs a few more passes and never the exactness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sparsity.scan import Candidates, collect, keep_above_
from sparsity.score import NUM_KEY_BITS, Score, magnitude
from sparsity.shards import ParameterShard, RankLayout, chunks

NUM_BIN_BITS = 12
SAMPLE_SIZE = 3 << 17
SAMPLE_SHARE = 1 / 256
"""The sample is the larger of the two, over all ranks."""
SAMPLE_SIGMAS = 3.0
MIN_CANDIDATES = 1 << 12
CANDIDATE_SHARE = 1 / 32


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
    candidates: Candidates | None = field(default=None, repr=False, compare=False)
    """This rank's keys around the threshold, all ties among them; None where they were too many to collect."""


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
    threshold = find_threshold(shards, num_pruned, score, layout)
    if threshold.num_ties_pruned == threshold.num_ties:
        for number in range(len(shards)):
            keep_above_(shards, number, score, threshold.key)
    elif threshold.candidates is not None:
        _prune_with_collected_ties(shards, threshold, threshold.candidates, score, layout)
    else:
        _prune_with_streamed_ties(shards, num_pruned, threshold, score, layout)
    return threshold


def find_threshold(shards: Sequence[ParameterShard], rank: int, score: Score, layout: RankLayout) -> Threshold:
    """The `rank`-th smallest key of all shards, rank counted from 1. Collective over the shard group."""
    device = shards[0].values.device
    bracket, share = _sample_bracket(shards, rank, score, layout)
    numel = sum(shard.values.numel() for shard in shards)
    limit = min(numel, math.ceil(min(1.5 * share, CANDIDATE_SHARE) * numel) + MIN_CANDIDATES)
    below, inside, candidates = collect(shards, score, bracket.lo, bracket.hi, limit)
    # At a threshold of 0 what was pruned before has the key of the ties: only the masks tell them apart.
    is_partial = candidates is None or bracket.lo == 0
    local = torch.tensor([below, inside, is_partial], dtype=torch.int64, device=device)
    num_below, num_inside, num_partial = layout.sum_counts(local).tolist()
    if num_below < rank <= num_below + num_inside:
        bracket = _Range(bracket.lo, bracket.hi, num_below)
        if num_partial:
            candidates = None
    else:
        candidates = None
        is_low = rank <= num_below
        bracket = _Range(0, bracket.lo) if is_low else _Range(bracket.hi, 1 << NUM_KEY_BITS, num_below + num_inside)
    while True:
        shift = max(0, (bracket.hi - bracket.lo - 1).bit_length() - NUM_BIN_BITS)
        keys = candidates.parts() if candidates is not None else _all_keys(shards, score)
        counts = layout.sum_counts(_histogram(keys, bracket, shift, device))
        bin_index, before, held = find_bin(counts, rank - bracket.below)
        lo = bracket.lo + (bin_index << shift)
        bracket = _Range(lo, min(bracket.hi, lo + (1 << shift)), bracket.below + before)
        if shift == 0:
            return Threshold(lo, bracket.below, held, rank - bracket.below, candidates)


def find_bin(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """The bin that holds the `rank`-th element (from 1), how many lie in bins before it, and how many in it."""
    upto = torch.cumsum(counts, dim=0)
    index = torch.searchsorted(upto, rank)
    # One host sync for all three.
    found, held, last = torch.stack([index, counts[index], upto[index]]).tolist()
    return found, last - held, held


def share_ties(totals: Sequence[int], quota: int) -> tuple[int, int]:
    """The parameter in which a quota of ties runs out, and how many of its ties the quota still covers."""
    for index, total in enumerate(totals):
        if quota <= total:
            return index, quota
        quota -= total
    raise AssertionError("more ties are to be pruned than there are")


def _all_keys(shards: Sequence[ParameterShard], score: Score) -> Iterator[Tensor]:
    for shard in shards:
        for part in chunks(shard.values.numel(), shard.values.device):
            yield score(shard, part)


def _sample_bracket(
    shards: Sequence[ParameterShard], rank: int, score: Score, layout: RankLayout
) -> tuple[_Range, float]:
    """A range of keys that very likely holds the `rank`-th smallest, and the share of the sample inside it.

    The sample is every n-th weight, n odd so that it wanders over the columns: it needs no generator, and as it decides
    the cost alone, never the result, its patterns do no harm.
    """
    device = shards[0].values.device
    numel = sum(shard.full_numel for shard in shards)
    keys = _sample(shards, numel // max(SAMPLE_SIZE, math.ceil(SAMPLE_SHARE * numel)) | 1, score)
    bracket, shift = _Range(0, 1 << NUM_KEY_BITS), NUM_KEY_BITS - NUM_BIN_BITS
    counts = layout.sum_counts(_histogram(_parts(keys), bracket, shift, device))
    size, share = int(counts.sum()), rank / numel
    if size == 0:
        return bracket, 1.0
    slack = SAMPLE_SIGMAS * math.sqrt(size * share * (1 - share)) + 1
    ranks = max(1, math.floor(share * size - slack)), min(size, math.ceil(share * size + slack))
    for _ in range(2):
        (first, below, _), (last, before, held) = (find_bin(counts, rank - bracket.below) for rank in ranks)
        inside = before + held - below
        lo = bracket.lo + (first << shift)
        bracket = _Range(lo, min(bracket.hi, bracket.lo + ((last + 1) << shift)), bracket.below + below)
        if shift == 0:
            break
        shift = max(0, (bracket.hi - bracket.lo - 1).bit_length() - NUM_BIN_BITS)
        counts = layout.sum_counts(_histogram(_parts(keys), bracket, shift, device))
    return bracket, inside / size


def _sample(shards: Sequence[ParameterShard], stride: int, score: Score) -> Tensor:
    """The keys of every `stride`-th local weight, counted through all shards."""
    starts, phase = [], 0
    for shard in shards:
        starts.append(phase)
        phase = (phase - shard.values.numel()) % stride
    sizes = [len(range(start, shard.values.numel(), stride)) for start, shard in zip(starts, shards, strict=True)]
    keys = torch.empty(sum(sizes), dtype=torch.int32, device=shards[0].values.device)
    filled = 0
    for shard, start, size in zip(shards, starts, sizes, strict=True):
        values, mask = shard.values[start::stride], shard.mask[start::stride]
        part = ParameterShard(shard.name, values, mask, shard.offset, shard.full_numel)
        keys[filled : filled + size] = score(part, slice(0, size))
        filled += size
    return keys


def _parts(keys: Tensor) -> Iterator[Tensor]:
    for part in chunks(len(keys), keys.device):
        yield keys[part]


def _histogram(keys: Iterable[Tensor], inside: _Range, shift: int, device: torch.device) -> Tensor:
    """Counts [number of bins] of the keys in a range, in bins of 2^shift keys."""
    num_bins = ((inside.hi - inside.lo - 1) >> shift) + 1
    histogram = torch.zeros(num_bins, dtype=torch.int64, device=device)
    for part in keys:
        if device.type == "cpu":
            found = part.numpy()
            # hi can be 2^31, which an int32 would wrap.
            found = found[(found >= np.int32(inside.lo)) & (found <= np.int32(inside.hi - 1))]
            histogram += torch.from_numpy(np.bincount((found - np.int32(inside.lo)) >> shift, minlength=num_bins))
        else:
            # torch.bincount and a boolean index would wait for the device; a last bin takes what is outside instead.
            is_inside = (part >= inside.lo) & (part <= inside.hi - 1)
            bins = torch.where(is_inside, (part.long() - inside.lo) >> shift, num_bins)
            counted = torch.zeros(num_bins + 1, dtype=torch.int64, device=device)
            histogram += counted.scatter_add_(0, bins, torch.ones_like(bins))[:num_bins]
    return histogram


def _num_ties_dropped(counts: list[int], quota: int, layout: RankLayout, device: torch.device) -> list[int]:
    """How many of each local shard's ties a quota over all ranks covers. Collective over the shard group."""
    totals = layout.sum_counts(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()
    last, quota = share_ties(totals, quota)
    before = sum(layout.gather_count(counts[last], device)[: layout.shard_rank])
    return [*counts[:last], min(max(0, quota - before), counts[last]), *[0] * (len(counts) - last - 1)]


def _prune_with_collected_ties(
    shards: Sequence[ParameterShard], threshold: Threshold, candidates: Candidates, score: Score, layout: RankLayout
) -> None:
    """Set the masks where only the first of the keys equal to the threshold are pruned, above a threshold of 0."""
    tied = (candidates.keys == threshold.key).nonzero().view(-1)
    starts = torch.searchsorted(tied, torch.tensor(candidates.starts, device=tied.device)).tolist()
    places = candidates.index[tied].long()
    counts = [stop - start for start, stop in pairwise(starts)]
    quotas = _num_ties_dropped(counts, threshold.num_ties_pruned, layout, tied.device)
    for number, (shard, start, count, quota) in enumerate(zip(shards, starts[:-1], counts, quotas, strict=True)):
        keep_above_(shards, number, score, threshold.key)
        if quota < count:
            shard.mask.index_fill_(0, torch.sort(places[start : start + count]).values[quota:], True)


def _prune_with_streamed_ties(
    shards: Sequence[ParameterShard], num_pruned: int, threshold: Threshold, score: Score, layout: RankLayout
) -> None:
    """The same where ties were not collected; at a threshold of 0 what was pruned before lies below the ties."""
    device = shards[0].values.device
    is_zero = threshold.key == 0

    def ties(shard: ParameterShard, part: slice, keys: Tensor) -> Tensor:
        return (keys == threshold.key) & shard.mask[part] if is_zero else keys == threshold.key

    counts = [
        sum(int(torch.count_nonzero(ties(s, part, score(s, part)))) for part in chunks(s.values.numel(), device))
        for s in shards
    ]
    quota = threshold.num_ties_pruned
    if is_zero:
        survivors = torch.tensor([sum(int(torch.count_nonzero(shard.mask)) for shard in shards)], device=device)
        quota = num_pruned - (sum(shard.full_numel for shard in shards) - int(layout.sum_counts(survivors)))
    for shard, num_left in zip(shards, _num_ties_dropped(counts, quota, layout, device), strict=True):
        for part in chunks(shard.values.numel(), device):
            keys = score(shard, part)
            tied = ties(shard, part, keys).nonzero().view(-1)
            keep = keys > threshold.key
            keep[tied[num_left:]] = True
            num_left = max(0, num_left - len(tied))
            shard.mask[part] = keep
