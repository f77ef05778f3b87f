"""Whole blocks: kept or pruned by the sum of their scores, the same on any number of ranks that keeps blocks whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import TrainerState

from conf.compose import composed
from sparsity import Constant, Cubic, OneShot, SparsityCallback, Ste
from sparsity.event import prune_pool_
from sparsity.factors import scaled
from sparsity.pattern import Blocks, parse_pattern
from sparsity.score import Random, magnitude
from sparsity.shards import ParameterShard
from tests.distributed import run_ranks
from tests.test_distributed import full_masks
from train.plan.run import plan_run


def shard_of(weight: Tensor, name: str = "weight") -> ParameterShard:
    return ParameterShard(
        name,
        weight.reshape(-1).clone(),
        torch.ones(weight.numel(), dtype=torch.bool),
        0,
        weight.numel(),
        tuple(weight.shape),
    )


def pruned_by_hand(weight: Tensor, rows: int, columns: int, num_blocks: int) -> Tensor:
    """Sums of |w| block by block, the smallest blocks pruned, of equal ones the first."""
    sums = []
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            block = weight[top : top + rows, left : left + columns]
            sums.append((sum(abs(float(value)) for value in block.reshape(-1)), top, left))
    mask = torch.ones_like(weight, dtype=torch.bool)
    for _, top, left in sorted(sums, key=lambda found: found[0])[:num_blocks]:
        mask[top : top + rows, left : left + columns] = False
    return mask


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (16, 1), (1, 4), (2, 2)])
def test_blocks_with_the_smallest_sums_go_whole(rows, columns):
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    shard = shard_of(weight)
    prune_pool_([shard], 3 * rows * columns, pattern=Blocks(rows, columns))
    assert torch.equal(shard.mask.view(16, 8), pruned_by_hand(weight, rows, columns, 3))


def test_4x1_is_four_outputs_of_one_input():
    weight = torch.ones(4, 3)
    weight[:, 1] = 0.5
    shard = shard_of(weight)
    prune_pool_([shard], 4, pattern=parse_pattern("4x1"))
    assert shard.mask.view(4, 3).tolist() == [[True, False, True]] * 4


def test_equal_blocks_go_from_the_first_on_and_zeros_in_a_kept_block_stay_weights():
    weight = torch.ones(4, 4)
    weight[0, 3] = 0.0
    shard = shard_of(weight)
    prune_pool_([shard], 8, pattern=Blocks(2, 2))
    assert (~shard.mask.view(4, 4)).nonzero().tolist() == [
        [0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3],
    ]  # fmt: skip


def test_a_factor_counts_in_the_sum_and_a_random_order_takes_whole_blocks():
    a, b = shard_of(torch.ones(2, 2), "a"), shard_of(torch.full((2, 2), 1.5), "b")
    prune_pool_([a, b], 4, pattern=Blocks(2, 2), score=scaled(magnitude, {"b": 0.5}))
    assert (int(a.mask.sum()), int(b.mask.sum())) == (4, 0)
    shard = shard_of(torch.randn(8, 4))
    prune_pool_([shard], 12, pattern=Blocks(4, 1), score=Random(1))
    assert sorted(shard.mask.view(2, 4, 4).sum(dim=1).view(-1).tolist()) == [0, 0, 0, 4, 4, 4, 4, 4]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))


def masks_through(pattern: str, kind: str) -> list[Tensor]:
    model, num_ranks = make_model(), torch.distributed.is_initialized()
    if num_ranks:
        for part in (model[0], model[2], model):
            fully_shard(part)
    update = {"update": Ste(0.5, 2, 1)} if kind == "ste" else {}
    callback = SparsityCallback(Cubic(0.7, 0, 4, 2), pattern=pattern, report=False, **update)
    callback.bind(model)
    callback.rule.prepare(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(6):
        state = TrainerState(global_step=step)
        callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, optimizer=optimizer)
        optimizer.zero_grad()
    callback.pruner.check_blocks()
    assert callback.kept["0.weight"] + callback.kept["2.weight"] == 224 - round(0.7 * 224 / 4) * 4
    return full_masks(callback)


@pytest.mark.parametrize("kind", ["shrink", "ste"])
def test_two_ranks_prune_the_blocks_of_one(kind):
    expected = masks_through("4x1", kind)
    for found in run_ranks(masks_through, 2, "4x1", kind):
        assert all(map(torch.equal, found, expected))


def refusal_of(pattern: str) -> str:
    with pytest.raises(ValueError, match="needs each block on one rank") as refused:
        masks_through(pattern, "shrink")
    return str(refused.value)


def test_blocks_that_two_ranks_would_share_are_refused_with_the_remedy():
    (first, second) = run_ranks(refusal_of, 2, "8x1")
    assert first == second
    assert first == (
        "pattern=8x1 needs each block on one rank, and FSDP2 shares the 8 outputs of 2.weight out to 2 ranks by 4: take a "
        "number of ranks that gives each a multiple of 8, or replicas (launch.num_replicas), or pattern=1x8."
    )


def test_a_plan_refuses_such_ranks_before_anything_starts():
    config = composed("train", ["experiment=demo", "sparsity.pattern=64x1"])
    assert plan_run(config, 1).num_pruned % 64 == 0
    with pytest.raises(
        ValueError, match=r"shares the 64 outputs of model\.layers\.0\.self_attn\.q_proj\.weight out to 2"
    ):
        plan_run(config, 2)


def test_a_layer_without_whole_blocks_is_refused_by_name():
    callback = SparsityCallback(OneShot(0.5, 0), pattern="4x1")
    with pytest.raises(
        ValueError, match=r"multiple of 4 outputs and of 1 inputs, and 1\.weight has the shape \[6, 4\]"
    ):
        callback.bind(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)))


def test_inherited_zeros_prune_blocks_that_are_all_zeros_and_no_others():
    model = make_model()
    with torch.no_grad():
        model[0].weight[:4, 2] = 0
        model[0].weight[5, 1] = 0
    callback = SparsityCallback(Constant(0.5), pattern="4x1", keep_zeros=True)
    callback.bind(model)
    callback.pruner.inherit()
    assert callback.pruner.inherited == {"0.weight": 4, "2.weight": 0}
    callback.prune_at(0)
    assert sum(callback.kept.values()) == 224 // 2


@pytest.mark.parametrize("text", ["1x1", "0x4", "4x", "x4", "4x1x1", "-4x1"])
def test_other_text_is_no_pattern(text):
    with pytest.raises(ValueError, match=f"pattern={text} is not known: choose unstructured, N:M"):
        parse_pattern(text)
