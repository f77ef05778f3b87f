"""Float8 linears: the layers, their parameters, what is refused, and with torchao's emulation a run on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from conf.compose import composed
from conf.schema import TrainerConfig
from sparsity import OneShot, SparsityCallback, prunable_parameters
from tests.distributed import run_ranks
from tests.small_trainer import random_rows
from train.plan.run import plan_run
from train.speed.fp8 import check_fp8, convert_to_fp8

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def llama(hidden_size: int = 32, intermediate_size: int = 48) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class FakeFloat8Linear(nn.Linear):
    """A layer with the same parameters as torchao's replacement of a linear layer."""


def fake_convert(model: nn.Module, *, config: Any, module_filter_fn: Any) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module_filter_fn(module, name):
            new = FakeFloat8Linear(module.in_features, module.out_features, bias=False, device="meta")
            new.weight = module.weight
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model


@pytest.fixture
def torchao(monkeypatch) -> None:
    """Install a fake torchao with the functions that we call."""
    package, float8 = ModuleType("torchao"), ModuleType("torchao.float8")
    float8.convert_to_float8_training = fake_convert  # type: ignore[attr-defined]
    float8.Float8LinearConfig = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", float8)


@pytest.fixture
def h100(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def check(device: torch.device, *overrides: str) -> None:
    config = composed("train", ["trainer.fp8=true", "trainer.torch_compile=true", *overrides])
    check_fp8(config, plan_run(config, 1), device)


def test_the_decoders_linears_are_replaced_with_the_same_parameters_and_lm_head_is_not(torchao):
    model = llama()
    before = dict(model.named_parameters())
    names = convert_to_fp8(model)
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.down_proj, FakeFloat8Linear)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_what_is_prunable_stays_prunable(torchao):
    model = llama()
    before = list(prunable_parameters(model))
    convert_to_fp8(model)
    assert list(prunable_parameters(model)) == before
    assert "lm_head.weight" in before
    assert len(before) == 15


def test_a_layer_with_a_dimension_that_is_no_multiple_of_16_stays_as_it_is(torchao):
    model = llama(intermediate_size=40)
    names = convert_to_fp8(model)
    assert len(names) == 8
    assert not any(".mlp." in name for name in names)
    with pytest.raises(ValueError, match="finds no linear layer whose inputs and outputs are multiples of 16"):
        convert_to_fp8(llama(hidden_size=36))


def test_a_cpu_is_told_that_float8_needs_a_gpu():
    with pytest.raises(ValueError, match=r"this machine has no GPU: set trainer\.fp8=false"):
        check(CPU)


def test_a_gpu_without_float8_units_is_named(monkeypatch, torchao):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8.9 or higher and NVIDIA A100-SXM4-80GB has 8.0"):
        check(GPU)


def test_without_torchao_the_extra_is_named(monkeypatch, h100):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"needs torchao.*pip install 'sparsellm\[fp8\]'"):
        check(GPU)


def test_micro_batches_of_a_number_of_tokens_that_float8_cannot_multiply_are_refused(h100, torchao):
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=1 x data\.sequence_length=90 is 90"):
        check(GPU, "batch_size=1", "trainer.per_device_train_batch_size=1", "data.sequence_length=90")


def test_without_compile_it_warns_and_with_it_says_nothing(h100, torchao, capsys):
    check(GPU)
    assert capsys.readouterr().err == ""
    check(GPU, "trainer.torch_compile=false")
    assert "without trainer.torch_compile=true is slower than bf16" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"bf16": False}, {"fp16": True}])
def test_another_compute_type_beside_float8_is_refused(other):
    with pytest.raises(ValueError, match="all that is not float8 is bfloat16"):
        TrainerConfig(fp8=True, **other)


def test_float8_weights_are_pruned_trained_saved_resumed_and_exported_as_plain_ones(tmp_path):
    pytest.importorskip("torchao.float8", reason="torchao is not installed: pip install 'sparsellm[fp8]'")
    whole, resumed = run_ranks(train_in_float8, 2, tmp_path)[0]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert whole.keys() == dict(llama().named_parameters()).keys()
    linear = [name for name in whole if "proj" in name]
    assert len(linear) == 14
    zeros, total = (sum(int(f(whole[name])) for name in [*linear, "lm_head.weight"]) for f in (num_zeros, torch.numel))
    assert zeros == total // 2
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight.isfinite().all()


def num_zeros(tensor: torch.Tensor) -> int:
    return int((tensor == 0).sum())


def train_in_float8(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train 8 emulated steps under FSDP2, pruning before the fifth; export these weights, and those after a resume."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
    first, losses = trained(folder, None)
    assert len(losses) == 8
    assert all(loss < 5 for loss in losses)
    second, again = trained(folder, folder / "checkpoints" / "checkpoint-6")
    assert again == losses
    return first, second


def trained(folder: Path, checkpoint: Path | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    from tests.small_trainer import small_trainer
    from train.distributed import join_world
    from train.model.export import export_model

    world, model = join_world(60), llama()
    assert len(convert_to_fp8(model, emulate=True)) == 14
    trainer = small_trainer(
        folder / "checkpoints", world=world, model=model, rows=random_rows(64, 16, 64), max_steps=8, save_steps=6,
        save_strategy="steps", save_total_limit=3, sparsity=SparsityCallback(OneShot(0.5, 4), report=False),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    export_model(trainer.model, Tokenizer(), folder / "model", dtype="float32", max_shard_size="5GB", world=world)
    torch.distributed.barrier()
    return load_file(folder / "model" / "model.safetensors"), trainer.step_losses().tolist()


class Tokenizer:
    """A tokenizer that is not written, because only the model is tested."""

    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""
