"""Factors on scores: keys of given tensors, masks compared with a sort, refusals, and the texts that state them."""

from __future__ import annotations

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conf.compose import composed
from launch.plan.request import read_request
from sparsity import Geometric, SparsityCallback
from sparsity.factors import factor_of, scaled
from sparsity.schedule import Fixed
from sparsity.score import magnitude
from sparsity.select import prune_smallest_
from sparsity.shards import ParameterShard
from tests.cards import compose_run, make_card
from tests.distributed import run_ranks
from train.plan.choices import choice_words
from train.plan.forecast import forecast
from train.plan.run import plan_run
from train.plan.text import run_text
from train.record.directory import RunDirectory, run_identity

DENORMAL = 2.0**-149
FACTORS = {"*q_proj*": 0.0625, "b": 0.1}


def shard_of(name: str, values: Tensor) -> ParameterShard:
    return ParameterShard(name, values, torch.ones(len(values), dtype=torch.bool), 0, len(values))


def scores(values: Tensor, factor: float) -> list[float]:
    keys = scaled(magnitude, {"w": factor})(shard_of("w", values), slice(0, len(values)))
    assert keys.dtype == torch.int32
    return keys.view(torch.float32).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_power_of_two_shifts_every_type_exactly(dtype):
    values = torch.tensor([-16.0, 1.5, -0.0, 0.0078125, torch.inf, -torch.inf], dtype=dtype)
    assert scores(values, 0.0625) == [1.0, 0.09375, 0.0, 0.00048828125, math.inf, math.inf]


def test_denormals_keep_their_order_until_they_round_to_zero():
    values = torch.tensor([32 * DENORMAL, -16 * DENORMAL, 40 * DENORMAL, 8 * DENORMAL, 2.0**-126])
    # Halves of the smallest denormal round to even: 2.5 to 2 of them, 0.5 to none.
    assert scores(values, 0.0625) == [2 * DENORMAL, DENORMAL, 2 * DENORMAL, 0.0, 2.0**-130]
    half = torch.tensor([2.0**-24, 2.0**-14], dtype=torch.float16)
    assert scores(half, 0.5) == [2.0**-25, 2.0**-15]


def test_other_factors_round_once_to_float32():
    values = torch.tensor([1.0, 3.0, -0.3, 1e-3, 123456.7])
    by_hand = np.abs(values.numpy()) * np.float32(0.1)
    assert by_hand.dtype == np.float32
    assert scores(values, 0.1) == by_hand.tolist()
    assert scores(torch.tensor([3e38, 2e38, 1.0]), 4.0) == [math.inf, math.inf, 4.0]


def test_nan_comes_last_whatever_its_factor():
    keys = scaled(magnitude, {"w": 0.0625})(shard_of("w", torch.tensor([torch.nan, torch.inf, 1.0])), slice(0, 3))
    assert keys[0] > keys[1] > keys[2]


def test_parameters_without_a_factor_have_the_keys_they_had():
    shard = shard_of("v_proj", torch.tensor([0.3, -2.0]))
    part = slice(0, 2)
    assert torch.equal(scaled(magnitude, {"*q_proj*": 0.1})(shard, part), magnitude(shard, part))
    assert scaled(magnitude, {}) is magnitude
    assert factor_of("layers.0.q_proj.weight", FACTORS) == 0.0625
    assert factor_of("b", FACTORS) == float(np.float32(0.1))


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16", "float16", "denormal", "mostly zeros"])
def test_masks_are_those_of_a_sort_of_the_products_event_after_event(kind):
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(2000, generator=generator) for _ in range(3)]
    tensors = {
        "normal": plain,
        "ties": [(t * 2).round() for t in plain],
        "bfloat16": [t.bfloat16() for t in plain],
        "float16": [(t * 1e-6).half() for t in plain],
        "denormal": [t * 1e-43 for t in plain],
        "mostly zeros": [t * (t > 1) for t in plain],
    }[kind]
    factors = [0.0625, 0.1, 1.0]
    shards = [shard_of(name, t) for name, t in zip(("q_proj", "b", "c"), tensors, strict=True)]
    for num_pruned in (700, 2500, 2501, 5400):
        masks = torch.cat([shard.mask for shard in shards])
        products = torch.cat(
            [t.float().abs() * torch.tensor(f, dtype=torch.float32) for t, f in zip(tensors, factors, strict=True)]
        )
        order = torch.sort(torch.where(masks, products.double(), -1.0), stable=True).indices
        expected = torch.ones_like(masks)
        expected[order[:num_pruned]] = False
        prune_smallest_(shards, num_pruned, score=scaled(magnitude, FACTORS))
        assert torch.equal(torch.cat([shard.mask for shard in shards]), expected)
        for shard in shards:
            shard.values[~shard.mask] = 0


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.q_proj.weight.copy_(torch.tensor([[0.5, -1.0, 24.0, 40.0]]))
            self.up.weight.copy_(torch.tensor([[0.25, -1.0, 2.0, 3.0]]))


def test_the_threshold_is_in_units_of_the_product():
    model = Pair()
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), factors={"*q_proj*": 0.0625})
    callback.bind(model)
    callback.pruner.prune(0.5)
    assert model.q_proj.weight.tolist() == [[0.0, 0.0, 24.0, 40.0]]
    # 24 / 16 is between 1 and 2.
    assert model.up.weight.tolist() == [[0.0, 0.0, 2.0, 3.0]]
    assert callback.threshold == 1.0
    callback.pruner.prune(0.375)
    assert model.q_proj.weight.tolist() == [[0.0, 0.0, 0.0, 40.0]]
    assert callback.threshold == 1.5


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan, 1e-60, 1e60])
def test_factors_that_order_nothing_are_refused(factor):
    with pytest.raises(ValueError, match=r"of '\*q_proj\*' in factors is not a positive number that float32 can hold"):
        SparsityCallback(Geometric(0.5, 0, 0, 1), factors={"*q_proj*": factor})


def test_factors_without_effect_are_refused():
    factors = {"*q_proj*": 0.5}
    with pytest.raises(ValueError, match="factors have no effect with score=random"):
        SparsityCallback(Geometric(0.5, 0, 0, 1), factors=factors, score="random")
    with pytest.raises(ValueError, match="factors have no effect with scope=uniform"):
        SparsityCallback(Geometric(0.5, 0, 0, 1), factors=factors, scope="uniform")
    with pytest.raises(ValueError, match=r"factors={'\*q_proj\*': 0.5} has no effect with Fixed\(\)"):
        SparsityCallback(Fixed(), factors=factors)


def test_patterns_that_match_nothing_or_one_name_twice_are_refused_by_the_plan_and_by_the_callback():
    for factors, words in (
        ({"*query*": 0.5}, "The pattern '*query*' in factors matches no prunable parameter"),
        ({"*embed_tokens*": 0.5}, "The pattern '*embed_tokens*' in factors matches no prunable parameter"),
        ({"*q_proj*": 0.5, "*proj*": 2.0}, "matches two patterns in factors, '*q_proj*' and '*proj*'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            SparsityCallback(Geometric(0.5, 0, 0, 1), factors=factors).bind(Pair())
        config = composed("train", ["experiment=demo"])
        config.sparsity.factors = factors
        with pytest.raises(ValueError, match=re.escape(words)):
            plan_run(config, 1)


@pytest.mark.parametrize(
    "typed", ["{'*q_proj*': 0.0625, \"*up*\": 2}", "{*q_proj*: 0.0625, *up*: 2}", "{*q_proj*:0.0625,*up*:2}"]
)
def test_the_plan_states_the_factors_that_were_typed_with_or_without_quotes(typed):
    request = read_request(["experiment=demo", f"sparsity.factors={typed}"])
    (config,) = request.runs
    assert config.sparsity.factors == {"*q_proj*": 0.0625, "*up*": 2.0}
    found = forecast(config, plan_run(config, 2), request.plan)
    assert found["choices"] == ["scores of *q_proj* times 0.0625", "scores of *up* times 2"]
    assert "scores of *q_proj* times 0.0625" in run_text(found)


def test_card_figures_and_terminal_state_the_factors_of_a_run_that_prunes():
    typed = "+sparsity.factors={*q_proj*: 0.0625}"
    assert "lowest magnitude first, that of `*q_proj*` times 0.0625, one threshold for all" in make_card(typed)
    for overrides, words in (
        ([typed], ["scores of *q_proj* times 0.0625"]),
        ([typed, "sparsity.target=0"], []),
        ([], []),
    ):
        config, plan = compose_run(*overrides)
        assert choice_words(config, prunes=plan.schedule is not None) == words


def test_a_run_with_other_factors_is_another_run(tmp_path):
    plain, other = (
        composed("train", ["experiment=demo", f"sparsity.factors={typed}"]) for typed in ("{}", "{*q_proj*: 0.5}")
    )
    assert run_identity(plain) != run_identity(other)
    directory = RunDirectory(tmp_path)
    directory.begin(other)
    with pytest.raises(ValueError, match=r"sparsity.factors.\*q_proj\* was 0.5, is None"):
        directory.finished(plain)


def pruned_shards(dtype: str) -> dict[str, Tensor]:
    """Return the gathered masks of three events on all ranks."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from train.model.export import full_tensor

    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict({"q_proj": nn.Linear(31, 9), "k_proj": nn.Linear(31, 5), "up": nn.Linear(31, 40)})
    )
    model = model.to(getattr(torch, dtype))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_((param * 40).round() / 40)
    if dist.is_initialized() and dist.get_world_size() > 1:
        fully_shard(model)
    callback = SparsityCallback(Geometric(0.8, 0, 0, 1), factors={"q_proj*": 0.0625, "k_proj*": 4.7})
    callback.bind(model)
    for density in (0.7, 0.5, 0.2):
        callback.pruner.prune(density)
    return {name: full_tensor(param.detach()) for name, param in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_prune_what_one_prunes(dtype):
    expected = pruned_shards(dtype)
    zeros = {name: float((weight == 0).float().mean()) for name, weight in expected.items()}
    assert zeros["k_proj.weight"] < zeros["up.weight"] < zeros["q_proj.weight"]
    for found in run_ranks(pruned_shards, 2, dtype):
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
