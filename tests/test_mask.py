"""Pruned weights are exactly 0 and stay 0; kept weights are not changed."""

from unittest import mock

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from sparsity import SparsityCallback
from sparsity.mask import (
    leaves_zeros,
    make_shards,
    mask_hash,
    masks_from_zeros,
    zero_all_pruned_,
    zero_pruned_,
    zero_pruned_state_,
)
from sparsity.prunable import linear_weights, own_linear_weights, plain_name, prunable_parameters
from sparsity.schedule import Geometric


def test_zeroing_leaves_no_negative_zero_and_no_nan():
    tensor = torch.tensor([[-1.0, float("nan")], [float("inf"), 2.0]])
    zero_pruned_(tensor, torch.tensor([False, False, False, True]))
    assert tensor.tolist() == [[0.0, 0.0], [0.0, 2.0]]
    assert not torch.signbit(tensor).any()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.complex128],
)
def test_zeroing_takes_any_type_and_any_strides(dtype):
    values, mask = torch.arange(1, 13).view(3, 4), torch.arange(12) % 5 != 0
    for tensor in (values.to(dtype), values.t().to(dtype).t()):
        zero_pruned_(tensor, mask)
        assert torch.equal(
            tensor.double() if not tensor.is_complex() else tensor.real, (values * mask.view(3, 4)).double()
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeroing_reaches_every_element_of_a_large_tensor(dtype):
    tensor, mask = torch.full((3, 40_001), float("nan"), dtype=dtype), torch.arange(120_003) % 7 == 0
    tensor.view(-1)[mask] = -2.0
    zero_pruned_(tensor, mask)
    assert torch.equal(tensor.view(-1), torch.where(mask, -2.0, 0.0).to(dtype))
    assert not torch.signbit(tensor.view(-1)[~mask]).any()


def test_a_mask_of_another_size_is_refused():
    for size in (1, 5):
        with pytest.raises(RuntimeError, match="shape"):
            zero_pruned_(torch.ones(4), torch.ones(size, dtype=torch.bool))


def test_a_nan_gradient_of_a_pruned_weight_vanishes_before_clipping():
    layer = nn.Linear(3, 2, bias=False)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(layer)
    callback.shards[0].mask[1] = False
    (layer.weight * torch.tensor([[1.0, float("nan"), 2.0], [1.0, 1.0, 1.0]])).sum().backward()
    assert layer.weight.grad[0].tolist() == [1.0, 0.0, 2.0]
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0).isfinite()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_every_moment_of_a_pruned_weight_is_zeroed(optimizer_class):
    param = nn.Parameter(torch.randn(4, 5))
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class([param], lr=0.1, **options)
    param.grad = torch.randn(4, 5)
    optimizer.step()
    mask = torch.arange(20) % 3 != 0
    zero_pruned_state_(optimizer, param, mask)
    states = [s for s in optimizer.state[param].values() if torch.is_tensor(s) and s.shape == param.shape]
    assert states
    for state in states:
        assert (state.view(-1)[~mask] == 0).all()
        assert (state.view(-1)[mask] != 0).all()


def test_masked_adamw_equals_a_reference_that_trains_only_the_survivors():
    torch.manual_seed(0)
    inputs, goals = torch.randn(32, 6), torch.randn(32, 4)
    layer = nn.Linear(6, 4, bias=False)
    start = layer.weight.detach().clone()
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    callback.pruner.prune(0.5, optimizer)
    mask = (layer.weight != 0).detach()

    survivors = nn.Parameter(start[mask].clone())
    reference = torch.optim.AdamW([survivors], lr=0.05, weight_decay=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        ((layer(inputs) - goals) ** 2).mean().backward()
        optimizer.step()
        reference.zero_grad()
        weight = torch.zeros_like(start).masked_scatter(mask, survivors)
        ((inputs @ weight.T - goals) ** 2).mean().backward()
        reference.step()
        assert (layer.weight[~mask] == 0).all()
    assert int(mask.sum()) == 12
    assert torch.allclose(layer.weight[mask], survivors, atol=1e-6)


def test_each_event_prunes_exactly_k_and_nothing_comes_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 7), nn.LayerNorm(7), nn.Linear(7, 5, bias=False))
    schedule = Geometric(0.9, 0, 40, 10)
    callback = SparsityCallback(schedule)
    callback.bind(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruned_before = torch.zeros(13 * 7 + 7 * 5, dtype=torch.bool)
    for step in range(50):
        if step in schedule.events():
            callback.pruner.prune(schedule.density(step), optimizer)
        model(torch.randn(8, 13)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        zeros = torch.cat([model[0].weight.view(-1), model[2].weight.view(-1)]) == 0
        assert int(zeros.sum()) == round((1 - schedule.density(step)) * zeros.numel())
        assert not (pruned_before & ~zeros).any()
        pruned_before = zeros
    assert callback.density == pytest.approx(int((~zeros).sum()) / zeros.numel())


def test_an_optimizer_that_mixes_weights_cannot_bring_one_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4, bias=False))
    callback = SparsityCallback(Geometric(0.75, 0, 0, 1))
    callback.bind(model)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    callback.pruner.prune(0.25, optimizer)
    for _ in range(3):
        model(torch.randn(8, 12)).pow(2).mean().backward()
        optimizer.step()
        assert sum(int((param == 0).sum()) for param in model.parameters()) < 96
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        assert sum(int((param == 0).sum()) for param in model.parameters()) == 96
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}, {"weight_decay": 0.5}, {"foreach": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_leaves_zeros_by_itself_once_its_states_are_zero(kind, options, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4, bias=False)).to(dtype)
    callback = SparsityCallback(Geometric(0.75, 0, 0, 1))
    callback.bind(model)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    masked = []
    for step in range(8):
        model(torch.randn(8, 12, dtype=dtype)).pow(2).mean().backward()
        optimizer.step()
        if step == 2:
            # The optimizer is left out here, so its moments are those of a dense model.
            callback.pruner.prune(0.5)
        if step == 5:
            callback.pruner.prune(0.25, optimizer)
        with mock.patch("sparsity.masked.zero_all_pruned_") as zero:
            zero.side_effect = zero_all_pruned_
            callback.on_optimizer_step(None, None, None, optimizer=optimizer)
            masked.append(zero.called)
        if step >= 2:
            weights = torch.cat([param.view(-1) for param in model.parameters()])
            assert int((weights == 0).sum()) == (64 if step < 5 else 96)
            assert not weights[weights == 0].signbit().any()
        optimizer.zero_grad()
    assert masked == [True, False, True, *[False] * 5]


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW([nn.Parameter(torch.ones(2))], eps=0.0),
        torch.optim.AdamW([nn.Parameter(torch.ones(2, dtype=torch.float16))]),
        torch.optim.SGD([nn.Parameter(torch.ones(2))]),
        type("Own", (torch.optim.AdamW,), {})([nn.Parameter(torch.ones(2))]),
    ],
)
def test_other_optimizers_are_not_trusted_to_leave_zeros(optimizer):
    assert not leaves_zeros(optimizer)


@pytest.mark.parametrize("moment", ["on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("flag", ["should_evaluate", "should_training_stop"])
def test_what_is_evaluated_or_left_is_sparse_whoever_wrote_to_the_weights(moment, flag):
    layer = nn.Linear(4, 4, bias=False)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), report=False)
    callback.bind(layer)
    callback.pruner.prune(0.5)
    with torch.no_grad():
        layer.weight.add_(1.0)
    getattr(callback, moment)(None, TrainerState(), TrainerControl(**{flag: True}))
    assert int((layer.weight == 0).sum()) == 8


def test_binding_again_forgets_the_run_before():
    layer = nn.Linear(4, 4, bias=False)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(layer)
    callback.pruner.prune(0.5)
    callback.bind(layer)
    assert (callback.threshold, callback.density, callback.average_density) == (None, 1.0, 1.0)
    layer(torch.ones(4)).sum().backward()
    assert (layer.weight.grad != 0).all()


def test_an_unknown_score_is_refused():
    with pytest.raises(
        ValueError, match="score=Magnitude is not known: choose one of magnitude, saliency, wanda, random, or"
    ):
        SparsityCallback(Geometric(0.5, 0, 0, 1), score="Magnitude")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(3, 3, dtype=torch.float64), "weight is float64"),
        (nn.Linear(3, 3).requires_grad_(False), "no trainable linear layer"),
    ],
)
def test_what_cannot_be_pruned_is_refused_at_the_start(layer, message):
    with pytest.raises(ValueError, match=message):
        SparsityCallback(Geometric(0.5, 0, 0, 1)).bind(layer)


def test_a_frozen_parameter_that_include_names_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    with pytest.raises(ValueError, match=r"1.weight is named in include but is frozen"):
        prunable_parameters(model, include=["*.weight"])


def test_a_tied_head_counts_as_the_embedding_that_it_is():
    assert list(own_linear_weights(Tied())) == ["up.weight"]


def test_masks_can_be_taken_over_from_zeros():
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight[0, 1] = layer.weight[1, 3] = 0
    shards = make_shards(prunable_parameters(layer))
    masks_from_zeros(shards)
    assert shards[0].mask.tolist() == [True, False, True, True, True, True, True, False]


def test_the_mask_hash_tells_masks_apart():
    layer = nn.Linear(100, 50, bias=False)
    shards = make_shards(prunable_parameters(layer))
    hashes = {mask_hash(shards)}
    for index in (0, 1, 7, 8, 2500, 4999):
        shards[0].mask[index] = False
        hashes.add(mask_hash(shards))
        shards[0].mask[index] = True
    shards[0].mask[:] = False
    hashes.add(mask_hash(shards))
    assert len(hashes) == 8
    shards[0].mask[:] = True
    assert mask_hash(shards) in hashes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def test_linear_weights_are_prunable_and_embeddings_norms_and_biases_are_not():
    model = nn.ModuleDict({"e": nn.Embedding(9, 4), "l": nn.Linear(4, 4), "n": nn.LayerNorm(4), "h": nn.Linear(4, 9)})
    assert list(prunable_parameters(model)) == ["l.weight", "h.weight"]


def test_conv1d_of_transformers_is_linear():
    from transformers.pytorch_utils import Conv1D

    assert list(linear_weights(nn.Sequential(Conv1D(4, 3)))) == ["0.weight"]


def test_a_tied_head_stays_dense_unless_named_and_it_is_said():
    with pytest.warns(UserWarning, match=r"head.weight shares its weight with an embedding and stays dense"):
        assert list(prunable_parameters(Tied())) == ["up.weight"]
    assert list(prunable_parameters(Tied(), include=["head.weight", "up.weight"])) == ["up.weight", "head.weight"]


def test_patterns_choose_and_spare_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert list(prunable_parameters(model, requires_dense=["2.*"])) == ["0.weight", "1.weight"]
    assert list(prunable_parameters(model, include=["*.weight"], requires_dense=["0*"])) == ["1.weight", "2.weight"]


@pytest.mark.parametrize("option", ["include", "requires_dense"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    with pytest.raises(ValueError, match=r"'mlp\.\*' in " + option + " matches no parameter"):
        prunable_parameters(nn.Sequential(nn.Linear(3, 3)), **{option: ["mlp.*"]})


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="No parameter of the model is prunable"):
        prunable_parameters(nn.LayerNorm(3))


def test_names_lose_what_wrappers_add():
    assert plain_name("module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.weight") == (
        "model.layers.0.mlp.weight"
    )
