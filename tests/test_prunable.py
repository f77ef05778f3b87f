"""The rule of `sparsity.prunable`: what is pruned, what stays dense with a message, and what is refused before training."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from sparsity import Geometric, Scope, SparsityCallback, prunable_parameters
from sparsity.event.collapse import all_zero_names
from sparsity.notices import warn_on_rank_0
from sparsity.prunable import linear_weights
from sparsity.scope import SCOPES
from sparsity.shards import RankLayout
from tests.distributed import run_ranks

SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def callback(**choices) -> SparsityCallback:
    return SparsityCallback(Geometric(0.5, 0, 0, 1), **choices)


def said(model: nn.Module, **choices) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback(**choices).bind(model)
    return [str(warning.message) for warning in caught]


class Own(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class OwnRMSNorm(Own):
    pass


class VocabParallelEmbedding(Own):
    pass


class ShortConvolution(Own):
    pass


def test_a_weight_of_two_or_three_dimensions_is_a_linear_layers_whoever_wrote_the_layer():
    model = nn.ModuleDict(
        {
            "te": Own(weight=torch.ones(4, 6), bias=torch.ones(4)),
            "stacked": Own(weight=torch.ones(2, 4, 6)),
            "mamba": Own(x_proj_weight=torch.ones(2, 4, 6), A_log=torch.ones(2, 4, 6)),
            "scale": Own(weight=torch.ones(1, 6)),
            "norm": OwnRMSNorm(weight=torch.ones(4, 6)),
            "table": VocabParallelEmbedding(weight=torch.ones(9, 6)),
            "kernel": ShortConvolution(weight=torch.ones(6, 4)),
        }
    )
    assert list(linear_weights(model)) == ["te.weight", "stacked.weight", "mamba.x_proj_weight"]


def test_matrices_that_no_rule_prunes_are_named_once_with_the_remedy():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "bilinear": nn.Bilinear(3, 4, 5),
            "kernel": nn.Conv1d(3, 4, 2),
            "rnn": nn.LSTM(3, 4),
            "table": nn.Embedding(5, 8),
            "norm": nn.LayerNorm([3, 4]),
        }
    )
    (message,) = said(model)
    assert message.startswith("attention.in_proj_weight, bilinear.weight, kernel.weight and 2 more stay dense")
    assert "name everything to be pruned in include" in message
    assert said(model, include=["attention.*weight"]) == []
    (shorter,) = said(model, requires_dense=["attention.in_proj_weight", "kernel*", "rnn*"])
    assert shorter.startswith("bilinear.weight stays dense")


def test_nothing_is_said_of_models_of_linear_layers_embeddings_and_norms():
    assert said(LlamaForCausalLM(LlamaConfig(**SIZES))) == []
    tied = said(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32)))
    assert [message.split(" shares")[0] for message in tied] == ["lm_head.weight"]


def test_kernels_and_state_matrices_of_mamba_are_named():
    config = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4, tie_word_embeddings=False)
    (message,) = said(MambaForCausalLM(config))
    assert message.startswith("backbone.layers.0.mixer.A_log, backbone.layers.0.mixer.conv1d.weight stay dense")


def warned_ranks() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_on_rank_0("said")
    return [str(warning.message) for warning in caught]


def test_the_first_rank_alone_speaks():
    assert run_ranks(warned_ranks, 2) == [["said"], []]


def test_a_model_with_frozen_layers_hears_what_is_pruned_and_what_is_not():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    (message,) = said(model)
    assert message == (
        "12 weights are trained and pruned (1.weight); 6 linear weights are frozen and stay as they are (0.weight) and "
        "are not counted in any density."
    )


def weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


def torch_pruning(layer: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


COMPUTED = [
    weight_norm,
    old_weight_norm,
    torch_pruning,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.orthogonal,
]


@pytest.mark.parametrize("change", COMPUTED)
def test_a_weight_that_is_computed_is_refused_by_name_unless_it_stays_dense(change):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[1])
    with pytest.raises(ValueError, match=r"^1.weight is computed from other parameters .*remove_parametrizations"):
        callback().bind(model)
    with pytest.raises(ValueError, match=r"^1.weight is computed"):
        callback(include=["*.weight"]).bind(model)
    assert list(prunable_parameters(model, requires_dense=["1.weight"])) == ["0.weight"]


def test_a_computed_weight_of_somebody_elses_layer_is_refused_too():
    layer = Own(weight=torch.ones(4, 6))
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"^weight is computed from other parameters"):
        callback().bind(layer)
    pruned = nn.Sequential(Own(weight=torch.ones(4, 6)))
    torch_pruning(pruned[0])
    with pytest.raises(ValueError, match=r"^0.weight is computed from other parameters"):
        callback().bind(pruned)


def test_a_plain_weight_again_is_pruned():
    layer = nn.Linear(8, 8)
    torch_pruning(layer)
    torch.nn.utils.prune.remove(layer, "weight")
    assert list(prunable_parameters(layer)) == ["weight"]


def test_a_parameter_of_zeros_is_refused_at_its_first_event():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    pruner = callback()
    pruner.bind(model)
    with pytest.raises(
        ValueError, match=r"^1.weight is all zeros at its first prune event.*requires_dense=\['1.weight'\]"
    ):
        pruner.prune_at(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_with_a_single_weight_at_its_end_is_not_all_zeros(dtype):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    model[0].weight.data[-1, -1] = float("nan")
    model[1].to(dtype)
    pruner = callback()
    pruner.bind(model)
    assert all_zero_names(pruner.shards, RankLayout()) == []
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    assert all_zero_names(pruner.shards, RankLayout()) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("choices", [{"requires_dense": ["1.*"]}, {"score": "random"}], ids=str)
def test_zeros_that_do_not_decide_are_no_error(choices):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    pruner = callback(**choices)
    pruner.bind(model)
    pruner.prune_at(0)
    assert pruner.density == 0.5


def test_a_sparsity_of_zero_prunes_no_zeros():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    pruner = SparsityCallback(Geometric(0.0, 0, 0, 1))
    pruner.bind(layer)
    pruner.prune_at(0)
    assert pruner.density == 1.0


def test_a_layer_that_loses_its_last_weight_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.constant_(model[0].weight, 1e-3)
    pruner = callback()
    pruner.bind(model)
    with pytest.warns(UserWarning, match=r"^0.weight has lost its last weight"):
        pruner.prune_at(0)


class Whole(Scope):
    """A user's own scope, in which all parameters compete."""

    def split(self, names):
        return [tuple(names)]


@pytest.mark.parametrize("scope", [*SCOPES, Whole()])
def test_the_remedy_of_a_lost_layer_fits_the_scope(scope):
    pruner = SparsityCallback(Geometric(0.8, 0, 0, 1), scope=scope)
    pruner.bind(nn.Linear(1, 1, bias=False))
    remedy = "or use scope=uniform" if scope == "global" or isinstance(scope, Whole) else "or lower its sparsity"
    with pytest.warns(UserWarning, match=f"^weight has lost its last weight; name it in requires_dense, {remedy}"):
        pruner.prune_at(0)


def refused_on_each_rank() -> str:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[1].weight[:2] = 0  # All of one rank's rows, and not of the other's.
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    pruner = callback()
    pruner.bind(model)
    try:
        pruner.prune_at(0)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_all_ranks_refuse_the_same_parameter_of_zeros():
    first, second = run_ranks(refused_on_each_rank, 2)
    assert first == second
    assert first.startswith("0.weight is all zeros at its first prune event")
