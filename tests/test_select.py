"""The exact selection compared with a sort, and its arithmetic beyond 2^31 weights."""

import pytest
import torch
from torch import Tensor

from sparsity.schedule import Geometric
from sparsity.score import Random, key_spacing_bits, magnitude, magnitude_of_key
from sparsity.select import prune_smallest_
from sparsity.select.histograms import find_bin, find_bins
from sparsity.select.inside import Collected, Counted
from sparsity.select.numpy_passes import NumpyPasses
from sparsity.select.search import share_ties
from sparsity.select.torch_passes import TorchPasses
from sparsity.shards import ParameterShard
from tests.kernel_oracles import HostReads


def whole(tensors: list[Tensor]) -> list[ParameterShard]:
    return [
        ParameterShard(f"p{i}", t.view(-1), torch.ones(t.numel(), dtype=torch.bool), 0, t.numel())
        for i, t in enumerate(tensors)
    ]


def kept_by_sort(tensors: list[Tensor], num_pruned: int, masks: list[Tensor]) -> Tensor:
    """Return the kept weights by a stable sort of magnitudes, pruned ones first; ties go by parameter and flat index."""
    magnitudes = torch.cat([t.double().abs().view(-1) for t in tensors])
    mask = torch.cat(masks)
    order = torch.sort(torch.where(mask, magnitudes, -1.0), stable=True).indices
    kept = torch.ones_like(mask)
    kept[order[:num_pruned]] = False
    return kept


def inputs(kind: str, generator: torch.Generator) -> list[Tensor]:
    normal = [torch.randn(shape, generator=generator) for shape in [(40, 7), (1, 1), (0, 5), (13, 3), (300,)]]
    return {
        "normal": normal,
        "ties": [(t * 2).round() for t in normal],
        "all equal": [torch.full_like(t, 0.5) for t in normal],
        "zeros": [torch.zeros_like(t) for t in normal],
        "mostly zeros": [t * (t > 1) for t in normal],
        "denormal": [t * 1e-42 for t in normal],
        "infinite": [torch.where(t > 1, torch.inf, t) for t in normal],
        "bfloat16": [t.bfloat16() for t in normal],
        "float16": [(t * 1e-6).half() for t in normal],
        "mixed": [t.bfloat16() if i % 2 else t for i, t in enumerate(normal)],
        "negative zero": [torch.where(t > 0, -0.0, t.round()) for t in normal],
        "empty": [torch.zeros(0), torch.zeros(0, 4), torch.randn(9, generator=generator)],
    }[kind]


KINDS = [
    "normal", "ties", "all equal", "zeros", "mostly zeros", "denormal", "infinite", "bfloat16", "float16", "mixed",
    "negative zero", "empty",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_selection_equals_a_sort_event_after_event(kind):
    generator = torch.Generator().manual_seed(0)
    tensors = inputs(kind, generator)
    numel = sum(t.numel() for t in tensors)
    shards = whole(tensors)
    for num_pruned in (0, 1, numel // 3, numel // 3, numel // 2 + 1, numel - 1, numel):
        expected = kept_by_sort(tensors, num_pruned, [shard.mask.clone() for shard in shards])
        prune_smallest_(shards, num_pruned)
        assert torch.equal(torch.cat([shard.mask for shard in shards]), expected)
        for tensor, shard in zip(tensors, shards, strict=True):
            tensor.view(-1).masked_fill_(~shard.mask, 0)


def test_survivors_that_reach_zero_are_ties_and_pruned_weights_stay_pruned():
    weights = torch.tensor([0.1, 0.0, 0.3, 0.0, 0.0, 0.6])
    shards = whole([weights])
    prune_smallest_(shards, 1)
    assert shards[0].mask.tolist() == [True, False, True, True, True, True]
    weights[0] = 0.0
    prune_smallest_(shards, 3)
    assert shards[0].mask.tolist() == [False, False, True, False, True, True]


def test_a_nan_weight_is_pruned_last():
    shards = whole([torch.tensor([float("nan"), 3.0, float("inf"), -1.0])])
    prune_smallest_(shards, 3)
    assert shards[0].mask.tolist() == [True, False, False, False]


@pytest.mark.slow
def test_selection_of_three_million_weights_equals_kthvalue():
    weights = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    for num_pruned in (5, 300_000, 1_500_000, 2_999_995):
        shards = whole([weights])
        prune_smallest_(shards, num_pruned)
        limit = torch.kthvalue(weights.abs(), num_pruned).values
        assert int((~shards[0].mask).sum()) == num_pruned
        assert weights[~shards[0].mask].abs().max() == limit
        assert weights[shards[0].mask].abs().min() >= limit


def test_a_sample_that_misleads_costs_time_but_not_exactness(monkeypatch):
    weights = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    weights[:100] = 1e-30
    for size in (1, 3, 1 << 18):
        monkeypatch.setattr("sparsity.select.search.SAMPLE_SIZE", size)
        monkeypatch.setattr("sparsity.select.search.SAMPLE_SIGMAS", 0.0)
        for num_pruned in (50, 101, 25_000, 49_999):
            shards = whole([weights])
            prune_smallest_(shards, num_pruned)
            assert torch.equal(shards[0].mask, kept_by_sort([weights], num_pruned, [torch.ones(50_000).bool()]))


def test_candidates_past_the_limit_are_streamed(monkeypatch):
    monkeypatch.setattr("sparsity.select.search.MIN_CANDIDATES", 10)
    monkeypatch.setattr("sparsity.select.search.CANDIDATE_SHARE", 0.0)
    weights = torch.randn(5_000, generator=torch.Generator().manual_seed(0))
    shards = whole([weights])
    prune_smallest_(shards, 2_345)
    assert torch.equal(shards[0].mask, kept_by_sort([weights], 2_345, [torch.ones(5_000).bool()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_that_were_collected_counted_or_streamed_answer_alike(dtype):
    generator = torch.Generator().manual_seed(0)
    shards = whole([(torch.randn(n, generator=generator) * 64).round().to(dtype) / 64 for n in (90_001, 0, 3, 40_000)])
    spacing = key_spacing_bits(shards, magnitude)
    assert spacing == (16 if dtype == torch.bfloat16 else 0)
    lo = tie = int(magnitude(whole([torch.tensor([0.5])])[0], slice(0, 1)))
    for num_keys in (40, 1 << 10):
        hi = lo + (num_keys << spacing)
        below, num_inside, inside = NumpyPasses(shards, magnitude).collect(lo, hi, 130_000)
        streamed = NumpyPasses(shards, magnitude)
        in_torch = TorchPasses(shards, magnitude).collect(lo, hi, 130_000)
        assert isinstance(inside, Counted if num_keys == 40 else Collected)
        assert isinstance(in_torch[2], Collected)
        assert (below, num_inside) == in_torch[:2]
        assert below == sum(int((shard.values.abs() < 0.5).sum()) for shard in shards)
        for other in (streamed, in_torch[2]):
            for shift in (spacing, spacing + 3):
                assert torch.equal(inside.histogram(lo, hi, shift), other.histogram(lo, hi, shift))
            low = lo + (8 << spacing)
            assert torch.equal(inside.histogram(low, hi, spacing), other.histogram(low, hi, spacing))
            assert inside.num_equal(tie) == other.num_equal(tie)
        assert inside.num_equal(tie) == [int((shard.values.abs() == 0.5).sum()) for shard in shards]
        assert inside.num_equal(tie)[0] > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_over_many_chunks_and_shards_go_in_order(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator).to(dtype) for n in (200_000, 70_001, 5)]
    if dtype == torch.float32:
        weights = [weight.bfloat16().float() for weight in weights]
    shards = whole(weights)
    for num_pruned in (100_001, 216_003, 270_005):
        expected = kept_by_sort(weights, num_pruned, [shard.mask.clone() for shard in shards])
        threshold = prune_smallest_(shards, num_pruned)
        assert threshold.num_ties > threshold.num_ties_pruned > 0 or num_pruned == 270_005
        assert torch.equal(torch.cat([shard.mask for shard in shards]), expected)
        for weight, shard in zip(weights, shards, strict=True):
            weight.masked_fill_(~shard.mask, 0)


def test_threshold_is_the_magnitude_of_the_last_pruned():
    weights = torch.tensor([4.0, -0.25, 1.5, -2.0])
    threshold = prune_smallest_(whole([weights]), 2)
    assert magnitude_of_key(threshold.key) == 1.5


def test_selection_draws_from_no_global_generator():
    before = torch.get_rng_state()
    prune_smallest_(whole([torch.ones(1000)]), 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ones", [1, 5_000, 70_000])
def test_nan_of_any_type_goes_last_and_never_too_few(dtype, num_ones):
    weights = torch.ones(num_ones + 3, dtype=dtype)
    weights[[0, num_ones // 2 + 1, num_ones + 2]] = float("nan")
    for num_pruned in (num_ones - 1, num_ones, num_ones + 1, num_ones + 3):
        shards = whole([weights])
        prune_smallest_(shards, num_pruned)
        gone = ~shards[0].mask
        assert int(gone.sum()) == num_pruned
        assert int((gone & weights.isnan()).sum()) == max(0, num_pruned - num_ones)


def test_more_weights_than_there_are_cannot_be_pruned():
    with pytest.raises(ValueError, match="4 of 3 weights cannot be pruned"):
        prune_smallest_(whole([torch.ones(3)]), 4)


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match="p0 is float64"):
        prune_smallest_(whole([torch.ones(3, dtype=torch.float64)]), 1)


def test_counts_past_two_to_the_31_find_the_right_bin():
    counts = torch.tensor([2**31 + 5, 3, 2**33, 7], dtype=torch.int64)
    assert find_bin(counts, 2**31 + 5) == (0, 0, 2**31 + 5)
    assert find_bin(counts, 2**31 + 6) == (1, 2**31 + 5, 3)
    assert find_bin(counts, 2**31 + 2**33 + 8) == (2, 2**31 + 8, 2**33)
    assert find_bin(counts, 2**31 + 2**33 + 15) == (3, 2**31 + 2**33 + 8, 7)


def test_the_bins_of_several_ranks_are_read_at_once():
    with HostReads() as reads:
        assert find_bins(torch.tensor([2, 0, 3, 1]), [1, 3, 6]) == [(0, 0, 2), (2, 2, 3), (3, 5, 1)]
    assert reads.found == ["tolist"]


def test_tie_quotas_past_two_to_the_31_are_shared_in_parameter_order():
    totals = [2**31, 0, 2**32, 9]
    assert share_ties(totals, 2**31) == (0, 2**31)
    assert share_ties(totals, 2**31 + 1) == (2, 1)
    assert share_ties(totals, 2**31 + 2**32 + 4) == (3, 4)


def test_the_number_pruned_past_two_to_the_31_is_exact():
    num_weights = 70_000_000_001
    schedule = Geometric(0.8, 0, 100, 10)
    assert round((1 - schedule.density(100)) * num_weights) == 56_000_000_001


def test_random_scores_depend_on_the_full_index_alone():
    values = torch.ones(1000)
    full = ParameterShard("w", values, torch.ones(1000, dtype=torch.bool), 0, 1000)
    late = ParameterShard("w", values[600:], torch.ones(400, dtype=torch.bool), 600, 1000)
    score = Random(seed=3)
    assert torch.equal(score(full, slice(600, 1000)), score(late, slice(0, 400)))
    assert not torch.equal(score(full, slice(0, 400)), score(late, slice(0, 400)))
    huge = ParameterShard("w", values, torch.ones(1000, dtype=torch.bool), 2**40, 2**41)
    assert score(huge, slice(0, 1000)).unique().numel() == 1000


def test_random_scores_prune_evenly_and_never_bring_back():
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    shards = whole([values[:20_000], values[20_000:]])
    prune_smallest_(shards, 10_000, score=Random(0))
    first = torch.cat([shard.mask.clone() for shard in shards])
    assert abs(int((~shards[0].mask).sum()) - 5_000) < 300
    prune_smallest_(shards, 20_000, score=Random(0))
    second = torch.cat([shard.mask for shard in shards])
    assert int((~second).sum()) == 20_000
    assert not (second & ~first).any()


def test_magnitude_keys_order_every_kind_of_float():
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-38, -0.5, 1.0, -3e38, float("-inf"), float("nan")])
    shard = ParameterShard("w", values, torch.ones(10, dtype=torch.bool), 0, 10)
    keys = magnitude(shard, slice(0, 10)).tolist()
    assert keys == sorted(keys)
    assert keys[0] == keys[1] == 0


def test_two_threads_prune_what_one_does():
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (300_000, 7, 150_001)]
    weights[0][::3] = 0.5
    masks = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        shards = whole(weights)
        prune_smallest_(shards, 170_000)
        masks.append(torch.cat([shard.mask for shard in shards]))
    torch.set_num_threads(1)
    assert torch.equal(*masks)
    assert int((~masks[0]).sum()) == 170_000


def test_a_bracket_that_holds_ties_keeps_the_last_of_them():
    weights = torch.arange(1, 400_001) / 400_000
    weights[100_000:300_000:2] = weights[200_000]
    shards = whole([weights])
    threshold = prune_smallest_(shards, 170_000)
    assert threshold.num_ties > threshold.num_ties_pruned > 0
    assert torch.equal(shards[0].mask, kept_by_sort([weights], 170_000, [torch.ones(400_000).bool()]))
