"""A user's own scores, schedules and scopes, by instance and by name; the gradients that a score gets; norms and shapes."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import TrainerState

from examples.own_score import Momentum, main
from sparsity import Constant, Cubic, Geometric, Ramp, Score, SparsityCallback
from sparsity.event.norms import inverse_norms
from sparsity.factors import factor_of
from sparsity.registry import label_of, name_of
from sparsity.scope import Erk, Pool, make_pools, num_pruned
from sparsity.score import SCORES, Random, magnitude
from sparsity.shards import ParameterShard, RankLayout
from tests.cards import make_card
from tests.distributed import run_ranks, shard_by_layers
from tests.test_distributed import full_masks


class Steep(Ramp):
    """A schedule that does all pruning in the first half of the window."""

    name = "steep"
    label = "all in the first half"

    @staticmethod
    def kept(sparsity: float, progress: float) -> float:
        return 1.0 - sparsity * min(1.0, 2 * progress)


class Columns(Score):
    """A score that is higher for later columns, whatever their weights are."""

    def values(self, shard: ParameterShard, part: slice) -> Tensor:
        return 1.0 + shard.index(part) % shard.shape[-1]


def test_the_example_of_an_own_score_runs_and_prunes_to_its_target(tmp_path):
    kept = main(str(tmp_path))
    assert sum(kept[name] * size for name, size in (("up.weight", 256), ("down.weight", 32))) == 288 - round(0.8 * 288)


def test_an_own_method_is_found_by_its_place_and_named_by_its_label(monkeypatch):
    module = ModuleType("my_methods")
    module.Columns, module.Steep = Columns, Steep
    monkeypatch.setitem(sys.modules, "my_methods", module)
    assert isinstance(SCORES.find("my_methods:Columns"), Columns)
    assert name_of(Columns()) == label_of(Columns()) == "tests.test_own_methods:Columns"
    card = make_card("sparsity.score=examples.own_score:Momentum", "sparsity.schedule=my_methods:Steep")
    assert f"unstructured, {Momentum.label}, one threshold for all; a pruned weight never comes back" in card
    assert "times in all, all in the first half" in card
    assert "examples.own_score-Momentum-pruning" in card


def test_a_score_sees_the_place_of_each_weight():
    layer = nn.Linear(6, 4, bias=False)
    callback = SparsityCallback(Constant(0.5), score=Columns())
    callback.bind(layer)
    callback.prune_at(0)
    assert callback.shards[0].mask.view(4, 6).tolist() == [[False] * 3 + [True] * 3] * 4
    assert callback.threshold == 3.0


def gradient_masks(layout: str) -> list[Tensor]:
    """Return masks after an event with the score |w g|; the loss of rank r is the sum of w x with x = r + 1 + column."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 4, bias=False))
    ranks = (0, 1)
    if layout == "fsdp2":
        fully_shard(model)
        ranks = (torch.distributed.get_rank(), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    callback = SparsityCallback(Geometric(0.5, 1, 1, 1), score="saliency")
    callback.bind(model)
    for step in (0, 1):
        state = TrainerState(global_step=step)
        callback.on_step_begin(None, state, None, optimizer=optimizer)
        inputs = torch.arange(1.0, 7.0) * (1.5 if ranks[1] == 1 else 1 + ranks[0])
        model(inputs).sum().backward()
        callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, optimizer=optimizer)
        optimizer.zero_grad()
    return full_masks(callback)


def test_a_score_is_lent_the_gradient_of_the_step_before_on_any_number_of_ranks():
    torch.manual_seed(0)
    products = (nn.Linear(6, 4, bias=False).weight.detach() * torch.arange(1.0, 7.0)).abs().view(-1)
    expected = torch.ones(24, dtype=torch.bool)
    expected[products.sort().indices[:12]] = False
    (alone,) = gradient_masks("one")
    assert torch.equal(alone.view(-1), expected)
    for (masks,) in run_ranks(gradient_masks, 2, "fsdp2"):
        assert torch.equal(masks, alone)


def test_a_score_that_needs_a_gradient_cannot_prune_before_the_first_step():
    with pytest.raises(ValueError, match="needs the gradient of the step before, but the first event is before step 0"):
        SparsityCallback(Constant(0.5), score="saliency")


# --- norms ---


def shard_of(name: str, values: Tensor, offset: int = 0, full: int = 0) -> ParameterShard:
    mask = torch.ones(len(values), dtype=torch.bool)
    return ParameterShard(name, values, mask, offset, full or len(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_those_of_exact_sums_to_a_millionth(dtype):
    values = torch.randn(100_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    squares = sum(Fraction(value) ** 2 for value in values.tolist())
    for normalize, exact in (("l2", math.sqrt(squares)), ("rms", math.sqrt(squares / 100_001))):
        found = inverse_norms([shard_of("w", values)], magnitude, normalize, RankLayout())
        assert 1 / found["w"] == pytest.approx(exact, rel=1e-6)
    assert inverse_norms([shard_of("w", torch.zeros(3))], magnitude, "l2", RankLayout()) == {"w": 1.0}
    tiny = inverse_norms([shard_of("w", torch.full((4,), 1e-42))], magnitude, "l2", RankLayout())
    assert tiny == {"w": 2.0**127}


class Uneven(nn.Sequential):
    """Layers whose weights differ by orders of magnitude; in each, many weights nearly tie after the division by norms."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(33, rows, bias=False) for rows in (17, 40, 5)))
        torch.manual_seed(0)
        with torch.no_grad():
            for number, layer in enumerate(self):
                layer.weight.copy_((torch.randn_like(layer.weight) * 8).round() * 10.0 ** -(3 * number))


def normalized_masks(normalize: str) -> tuple[list[Tensor], dict[str, float]]:
    model = Uneven()
    if torch.distributed.is_initialized():
        shard_by_layers(model, model)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), normalize=normalize, factors={"2.*": 3.0})
    callback.bind(model)
    for density in (0.7, 0.4):
        callback.pruner.prune(density)
    norms = inverse_norms(callback.shards, magnitude, normalize, callback.pruner.layout)
    return full_masks(callback), norms


@pytest.mark.parametrize("normalize", ["l2", "rms"])
def test_norms_and_masks_are_the_same_bits_on_one_and_two_ranks(normalize):
    masks, norms = normalized_masks(normalize)
    for found, their_norms in run_ranks(normalized_masks, 2, normalize):
        assert their_norms == norms
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(masks, found, strict=True))
    # Without the division all of the third layer would be pruned.
    assert all(0.1 < mask.float().mean() < 0.9 for mask in masks)
    weights = [layer.weight.detach().double() for layer in Uneven()]
    assert factor_of("2.weight", {"2.*": 3.0}) == 3.0
    scores = [w.abs() / (w.norm() if normalize == "l2" else w.square().mean().sqrt()) for w in weights]
    scores[2] *= 3
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), normalize=normalize, factors={"2.*": 3.0})
    callback.bind(Uneven())
    callback.pruner.prune(0.7)
    kept = torch.cat([shard.mask for shard in callback.shards])
    flat = torch.cat([score.view(-1) for score in scores])
    assert flat[~kept].max() <= flat[kept].min() * (1 + 1e-6)


# --- targets by shape ---


def test_erk_keeps_small_layers_denser_and_prunes_exactly_the_schedules_number():
    shapes = {"a": (100, 100), "b": (10, 100), "c": (4, 8), "d": (3, 50, 20)}
    pools = make_pools(shapes, "erk")
    numel = sum(pool.numel for pool in pools)
    schedule = Cubic(0.9, 3, 90, 3)
    before = [0] * 4
    for step in range(-1, 100):
        counts = Erk().counts(pools, schedule, step)
        assert sum(counts) == num_pruned(numel, schedule.density(step) if step >= 0 else 1.0)
        assert all(was <= now <= pool.numel for was, now, pool in zip(before, counts, pools, strict=True))
        before = counts
    kept = {pool.names[0]: 1 - count / pool.numel for pool, count in zip(pools, before, strict=True)}
    # All 32 of "c" stay; the other layers share the rest in the ratio 0.02 to 0.11 to 0.07.
    scale = (round(0.1 * numel) - 32) / (0.02 * 10_000 + 0.11 * 1_000 + 0.07 * 3_000)
    assert kept == pytest.approx({"a": 0.02 * scale, "b": 0.11 * scale, "c": 1.0, "d": 0.07 * scale}, abs=1e-3)


def test_erk_shares_out_each_group_by_itself():
    shapes = {"a.q": (8, 8), "a.mlp": (8, 32), "b.mlp": (32, 8)}
    from sparsity import Group

    pools = make_pools(shapes, "erk", [Group(("*mlp",), 0.5)])
    counts = Erk().counts(pools, Constant(0.25), 0)
    assert dict(zip((pool.names[0] for pool in pools), counts, strict=True)) == {"a.mlp": 128, "b.mlp": 128, "a.q": 16}
    assert pools[0] == Pool(("a.mlp",), 256, 0.5, 0, (8, 32))


def test_a_random_order_follows_its_own_seed_or_the_runs():
    assert SCORES.find("random").seeded(7).seed == 7
    assert Random(3).seeded(7).seed == 3
