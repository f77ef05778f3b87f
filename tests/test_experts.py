"""Mixture-of-experts models: experts and routers are pruned, counted and stored like the weights of linear layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from eval.model.zeros import count_zeros
from sparsity import Geometric, SparsityCallback
from sparsity.compact.folder import compact_folder, expand_folder
from sparsity.compact.rounding import Rounding
from sparsity.prunable import linear_weights, prunable_parameters
from tests.distributed import run_ranks, shard_by_layers
from tests.test_distributed import full_masks

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1, head_dim=8)
    ),
    "OLMoE": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
}
ATTENTION, ROUTER, EXPERTS, HEAD = 4 * 16 * 16, 4 * 16, 4 * 3 * 24 * 16, 64 * 16
WEIGHTS = 2 * (ATTENTION + ROUTER + EXPERTS) + HEAD


def made(name: str) -> PreTrainedModel:
    set_seed(0)
    return MODELS[name]()


def is_multiplied(name: str, param: torch.Tensor) -> bool:
    return param.dim() > 1 and "embed" not in name


def zeros_and_weights(model: nn.Module) -> tuple[int, int]:
    matrices = [param for name, param in model.named_parameters() if is_multiplied(name, param)]
    return sum(int((param == 0).sum()) for param in matrices), sum(param.numel() for param in matrices)


def trained(model: nn.Module, folder: Path, **choices) -> SparsityCallback:
    callback = SparsityCallback(
        Geometric(sparsity=choices.pop("sparsity", 0.8), start_step=1, end_step=3, every_steps=1), **choices
    )
    ids = torch.arange(16)
    arguments = TrainingArguments(
        str(folder), max_steps=5, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-2
    )
    Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 40, callbacks=[callback],
        data_collator=default_data_collator,
    ).train()  # fmt: skip
    return callback


@pytest.mark.parametrize("name", MODELS)
def test_training_ends_with_the_density_over_experts_routers_and_linear_layers(tmp_path, name):
    model = made(name)
    callback = trained(model, tmp_path)
    assert callback.num_prunable == WEIGHTS
    assert zeros_and_weights(model) == (round(0.8 * WEIGHTS), WEIGHTS)
    expert = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert 0.5 < (expert == 0).float().mean() < 1


@pytest.mark.parametrize("name", MODELS)
def test_zeros_of_experts_are_counted_in_memory_and_from_the_files(tmp_path, name):
    model = made(name)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[:3] = 0
    expected = 2 * 3 * 2 * 24 * 16
    found = count_zeros(model)
    assert (found.num_weights, found.num_zeros) == (WEIGHTS, expected)
    assert found.layers["model.layers.0.mlp.experts.gate_up_proj"].sparsity == 0.75
    model.save_pretrained(tmp_path)
    assert count_zeros(AutoModelForCausalLM.from_pretrained(tmp_path)) == found


def test_a_layer_holds_experts_without_transformers_too():
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ParameterList([torch.ones(4, 6, 8)])
            self.gate = nn.Linear(8, 4)
            self.expert_bias = nn.Parameter(torch.ones(4, 6))

    assert list(linear_weights(Mixture())) == ["experts.0", "gate.weight"]


def test_routers_are_pruned_whether_they_are_linear_layers_or_not():
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    assert issubclass(Llama4Router, nn.Linear)
    config = MixtralConfig(**SIZES, num_local_experts=4)
    assert list(prunable_parameters(nn.ModuleDict({"gate": MixtralTopKRouter(config)}))) == ["gate.weight"]


def prune_experts(sharded: bool) -> list[torch.Tensor]:
    """Return the masks of a Mixtral with 4 experts after two events, on all ranks."""
    model = made("Mixtral")
    if sharded:
        shard_by_layers(model, model.model.layers)
    callback = SparsityCallback(Geometric(0.8, 0, 0, 1))
    callback.bind(model)
    callback.pruner.prune(0.5)
    callback.pruner.prune(0.2)
    counted = count_zeros(model)
    assert (counted.num_weights, counted.num_zeros) == (WEIGHTS, round(0.8 * WEIGHTS))
    if sharded and dist.get_world_size() == 3:
        rows = model.get_parameter("model.layers.0.mlp.experts.down_proj").to_local().shape[0]
        assert rows == (2, 2, 0)[dist.get_rank()]
    return full_masks(callback)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_prune_the_experts_that_one_does(world_size):
    alone = prune_experts(sharded=False)
    for found in run_ranks(prune_experts, world_size, True, timeout_s=240):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))


def resume_experts(folder: str) -> list[torch.Tensor]:
    """Check that a new callback restores the masks from weights and saved state, under FSDP2, and return the masks."""
    model = made("Mixtral")
    shard_by_layers(model, model.model.layers)
    callback = SparsityCallback(Geometric(0.8, 0, 0, 1))
    callback.bind(model)
    callback.pruner.prune(0.2)
    expert = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert isinstance(expert, DTensor)
    from sparsity.resume import surviving_zeros

    before = full_masks(callback)
    saved = {**callback.state(), "step": 1, "surviving_zeros": surviving_zeros(callback.shards, callback.pruner.layout)}
    resumed = SparsityCallback(Geometric(0.8, 0, 0, 1))
    resumed.bind(model)
    resumed.restore(1, saved)
    assert all(torch.equal(a, b) for a, b in zip(before, full_masks(resumed), strict=True))
    return before


def test_masks_of_experts_come_back_from_the_zeros(tmp_path):
    first, second = run_ranks(resume_experts, 2, str(tmp_path), timeout_s=240)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_of_four_runs_along_the_inputs_of_each_expert(tmp_path):
    model = made("Mixtral")
    trained(model, tmp_path, sparsity=0.5, pattern="2:4")
    for name, param in model.named_parameters():
        if is_multiplied(name, param):
            assert set((param.reshape(-1, 4) != 0).sum(dim=1).tolist()) <= {0, 1, 2}, name
    assert zeros_and_weights(model) == (WEIGHTS // 2, WEIGHTS)


def gpt_oss() -> GptOssForCausalLM:
    set_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=8))


def test_experts_stored_with_their_inputs_first_take_no_pattern():
    SparsityCallback(Geometric(0.5, 0, 0, 1)).bind(gpt_oss())
    with pytest.raises(
        ValueError, match=r"nothing says that model.layers.0.mlp.experts.gate_up_proj is stored that way"
    ):
        SparsityCallback(Geometric(0.5, 0, 0, 1), pattern="2:4").bind(gpt_oss())


def test_biases_of_experts_are_not_pruned():
    names = list(prunable_parameters(gpt_oss()))
    assert "model.layers.0.mlp.experts.down_proj" in names
    assert not [name for name in names if "bias" in name]


@torch.no_grad()
def test_a_compact_folder_holds_three_dimensional_experts(tmp_path):
    model = gpt_oss()
    for weight in linear_weights(model).values():
        weight.masked_fill_(torch.rand_like(weight) < 0.8, 0)
    model.save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    for (name, mine), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3-MoE"])
@pytest.mark.parametrize(
    "rounding", [Rounding(8), Rounding(4), Rounding(8, group=0)], ids=["int8", "int4", "int8 by row"]
)
@torch.no_grad()
def test_rounded_experts_load_as_their_folder_expands(tmp_path, kind, rounding):
    model = made(kind).bfloat16()
    for name, weight in linear_weights(model).items():
        if name != "model.layers.0.mlp.experts.down_proj":
            weight.masked_fill_(torch.rand_like(weight) < 0.8, 0)
    # One expert in four stays dense: a bitmask would not make it smaller.
    model.get_parameter("model.layers.0.mlp.experts.down_proj")[1:] *= torch.rand(3, 1, 1) < 0
    model.save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact", rounding=rounding)
    expand_folder(tmp_path / "compact", tmp_path / "expanded")
    for dtype in (torch.bfloat16, torch.float16):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=dtype)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded", dtype=dtype)
        for (name, mine), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
            assert mine.dtype == dtype, name
            torch.testing.assert_close(mine, theirs, rtol=1e-2 if dtype == torch.float16 else 0, atol=0)
