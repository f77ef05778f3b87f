"""The smallest keys of all shards: exact, with no gather of weights and no sort.

Every key lies on some rank; what crosses ranks are counts of keys, so the traffic does not grow with the model. A sample
brackets the threshold; one pass counts what lies below the bracket and collects the few keys inside it; histograms of
those narrow the bracket to a single key (Floyd and Rivest 1975, in the key space of a radix sort). A bracket that
misses costs two more passes and never the exactness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.score import NUM_KEY_BITS, Score, magnitude
from sparsity.shards import ParameterShard, RankLayout, chunks

NUM_BIN_BITS = 16
SAMPLE_SIZE = 1 << 18
SAMPLE_SIGMAS = 4.0
MIN_CANDIDATES = 1 << 16
CANDIDATE_SHARE = 1 / 32


@dataclass(frozen=True)
class Threshold:
    """Pruned is every key below `key`, and `num_ties_pruned` of the `num_ties` keys equal to it."""

    key: int
    num_below: int
    num_ties: int
    num_ties_pruned: int


@dataclass(frozen=True)
class _Range:
    """Keys lo .. hi - 1, with `below` keys of all ranks under lo; it is known to hold the key that is looked for."""

    lo: int
    hi: int
    below: int


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
        for shard in shards:
            for part in chunks(shard.values.numel(), shard.values.device):
                torch.gt(score(shard, part), threshold.key, out=shard.mask[part])
    else:
        _prune_with_ties(shards, num_pruned, threshold, score, layout)
    return threshold


def find_threshold(shards: Sequence[ParameterShard], rank: int, score: Score, layout: RankLayout) -> Threshold:
    """The `rank`-th smallest key of all shards, rank counted from 1. Collective over the shard group."""
    device = shards[0].values.device
    bracket = _sample_bracket(shards, rank, score, layout)
    below, candidates = _count_and_collect(shards, score, bracket)
    inside, counts = bracket, torch.tensor([below, candidates.num_inside], dtype=torch.int64, device=device)
    num_below, num_inside = (int(count) for count in layout.sum_counts(counts).tolist())
    if num_below < rank <= num_below + num_inside:
        inside = _Range(bracket.lo, bracket.hi, num_below)
    elif rank <= num_below:
        inside, candidates = _Range(0, bracket.lo, 0), _Candidates(shards, score)
    else:
        inside, candidates = _Range(bracket.hi, 1 << NUM_KEY_BITS, num_below + num_inside), _Candidates(shards, score)
    while True:
        shift = max(0, (inside.hi - inside.lo - 1).bit_length() - NUM_BIN_BITS)
        histogram = _histogram(candidates.keys(), inside, shift, device)
        bin_index, before, held = find_bin(layout.sum_counts(histogram), rank - inside.below)
        lo = inside.lo + (bin_index << shift)
        inside = _Range(lo, min(inside.hi, lo + (1 << shift)), inside.below + before)
        if shift == 0:
            return Threshold(lo, inside.below, held, rank - inside.below)


def find_bin(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """The bin that holds the `rank`-th element (from 1), how many lie in bins before it, and how many in it."""
    upto = torch.cumsum(counts, dim=0)
    index = int(torch.searchsorted(upto, rank))
    held = int(counts[index])
    return index, int(upto[index]) - held, held


def share_ties(totals: Sequence[int], quota: int) -> tuple[int, int]:
    """The parameter in which a quota of ties runs out, and how many of its ties the quota still covers."""
    for index, total in enumerate(totals):
        if quota <= total:
            return index, quota
        quota -= total
    raise AssertionError("more ties are to be pruned than there are")


class _Candidates:
    """The local keys that can still be the one looked for: collected, or streamed from the shards where too many."""

    def __init__(self, shards: Sequence[ParameterShard], score: Score, collected: list[Tensor] | None = None) -> None:
        self.shards, self.score, self.collected, self.num_inside = shards, score, collected, 0

    def keys(self) -> Iterator[Tensor]:
        if self.collected is not None:
            yield from self.collected
        else:
            for shard in self.shards:
                for part in chunks(shard.values.numel(), shard.values.device):
                    yield self.score(shard, part)


def _sample_bracket(shards: Sequence[ParameterShard], rank: int, score: Score, layout: RankLayout) -> _Range:
    """A range of keys that very likely holds the `rank`-th smallest, from a sample of each shard in proportion.

    The sample has a generator of its own and decides the cost alone, never the result.
    """
    device = shards[0].values.device
    numel = sum(shard.full_numel for shard in shards)
    generator = torch.Generator(device).manual_seed(layout.shard_rank)
    shift = NUM_KEY_BITS - NUM_BIN_BITS
    keys = [torch.zeros(0, dtype=torch.int32, device=device)]
    for shard in shards:
        local = shard.values.numel()
        size = min(local, math.ceil(SAMPLE_SIZE * local / numel))
        if size:
            index = torch.randint(local, (size,), generator=generator, device=device)
            sample = ParameterShard(shard.name, shard.values[index], shard.mask[index], shard.offset, shard.full_numel)
            keys.append(score(sample, slice(0, size)))
    histogram = layout.sum_counts(torch.bincount(torch.cat(keys) >> shift, minlength=1 << NUM_BIN_BITS))
    size, share = int(histogram.sum()), rank / numel
    slack = SAMPLE_SIGMAS * math.sqrt(size * share * (1 - share)) + 1
    first = find_bin(histogram, max(1, math.floor(share * size - slack)))[0]
    last = find_bin(histogram, min(size, math.ceil(share * size + slack)))[0]
    return _Range(first << shift, (last + 1) << shift, 0)


def _count_and_collect(shards: Sequence[ParameterShard], score: Score, bracket: _Range) -> tuple[int, _Candidates]:
    """One pass over the local shards: how many keys lie below the bracket, and those inside it."""
    limit = max(MIN_CANDIDATES, int(CANDIDATE_SHARE * sum(shard.values.numel() for shard in shards)))
    below, inside, num_collected = 0, 0, 0
    collected = [torch.zeros(0, dtype=torch.int32, device=shards[0].values.device)]
    for shard in shards:
        for part in chunks(shard.values.numel(), shard.values.device):
            keys = score(shard, part)
            under = keys < bracket.lo
            within = (keys <= bracket.hi - 1) ^ under
            below += int(torch.count_nonzero(under))
            if num_collected <= limit:
                collected.append(keys[within])
                count = collected[-1].numel()
                num_collected += count
                inside += count
            else:
                inside += int(torch.count_nonzero(within))
    candidates = _Candidates(shards, score, [torch.cat(collected)] if num_collected <= limit else None)
    candidates.num_inside = inside
    return below, candidates


def _histogram(keys: Iterator[Tensor], inside: _Range, shift: int, device: torch.device) -> Tensor:
    """Counts [number of bins] of the keys in a range, in bins of 2^shift keys."""
    num_bins = ((inside.hi - inside.lo - 1) >> shift) + 1
    histogram = torch.zeros(num_bins, dtype=torch.int64, device=device)
    for part in keys:
        # hi can be 2^31, which an int32 comparison would wrap.
        part = part[(part >= inside.lo) & (part <= inside.hi - 1)]
        histogram += torch.bincount((part - inside.lo) >> shift, minlength=num_bins)
    return histogram


def _prune_with_ties(
    shards: Sequence[ParameterShard], num_pruned: int, threshold: Threshold, score: Score, layout: RankLayout
) -> None:
    """Set the masks where only the first of the keys equal to the threshold are pruned."""
    device = shards[0].values.device

    def ties(shard: ParameterShard, part: slice) -> Tensor:
        tied = score(shard, part) == threshold.key
        # Weights pruned before have the key 0: at a threshold of 0 they are no ties, they lie below.
        return tied & shard.mask[part] if threshold.key == 0 else tied

    counts = [
        sum(int(torch.count_nonzero(ties(shard, part))) for part in chunks(shard.values.numel(), device))
        for shard in shards
    ]
    quota = threshold.num_ties_pruned
    if threshold.key == 0:
        survivors = torch.tensor([sum(int(torch.count_nonzero(shard.mask)) for shard in shards)], device=device)
        quota = num_pruned - (sum(shard.full_numel for shard in shards) - int(layout.sum_counts(survivors)))
    totals = layout.sum_counts(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()
    last, quota = share_ties(totals, quota)
    before = sum(layout.gather_count(counts[last], device)[: layout.shard_rank])
    num_dropped = [*counts[:last], min(max(0, quota - before), counts[last]), *[0] * (len(shards) - last - 1)]
    for shard, num_left in zip(shards, num_dropped, strict=True):
        for part in chunks(shard.values.numel(), device):
            drop = ties(shard, part).nonzero().view(-1)[:num_left] if num_left else None
            keep = score(shard, part) >= threshold.key
            if threshold.key == 0:
                keep &= shard.mask[part]
            if drop is not None:
                keep[drop] = False
                num_left -= drop.numel()
            shard.mask[part] = keep
