"""The final model's folder, written from FSDP2 shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conf.schema import ModelConfig
from sparsity import Geometric, SparsityCallback
from tests.distributed import run_ranks, shard_by_layers
from train.data.tokenizer import train_bpe, wrap_bpe
from train.distributed import World
from train.model.build import build_model
from train.model.export import export_model

IDS = torch.arange(24).view(2, 12) % 61


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    folder.mkdir(exist_ok=True)
    train_bpe(["a few words to train on"], 260, folder / "tokenizer.json")
    return wrap_bpe(folder / "tokenizer.json", 16)


def export_shards(folder: str, dtype: str, tied: bool) -> tuple[torch.Tensor, int]:
    """Shard, prune and export a model on all ranks; return its logits and its number of zeros."""
    tokenizer = tokenizer_in(Path(folder) / f"tokenizer-{dist.get_rank()}")
    config = ModelConfig(
        name="tiny", vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = build_model(config, tokenizer, seed=0)
    shard_by_layers(model, model.model.layers)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    callback.pruner.prune(0.3)
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    export_model(model, tokenizer, Path(folder) / "model", dtype=dtype, max_shard_size="20KB", world=world)
    with torch.no_grad():
        logits = model(IDS).logits
    return logits, callback.num_prunable - sum(callback.kept.values())


@pytest.fixture(scope="module", params=[("float32", False), ("bfloat16", False), ("float32", True)], ids=str)
def exported(request, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("export")
    dtype, tied = request.param
    logits, num_zeros = run_ranks(export_shards, 2, str(folder), dtype, tied)[0]
    return {"folder": folder / "model", "dtype": dtype, "tied": tied, "logits": logits, "num_zeros": num_zeros}


def test_the_loaded_models_logits_equal_the_trained_ones(exported):
    model = AutoModelForCausalLM.from_pretrained(exported["folder"], dtype=torch.float32)
    with torch.no_grad():
        found = model(IDS).logits
    tolerance = 1e-6 if exported["dtype"] == "float32" else 0.02
    assert torch.allclose(found, exported["logits"], atol=tolerance)


def test_files_are_split_by_size_and_hold_exact_zeros(exported):
    files = sorted(exported["folder"].glob("model-*.safetensors"))
    assert len(files) > 1
    assert json.loads((exported["folder"] / "model.safetensors.index.json").read_text())["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(exported["folder"])
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if "proj" in name or name.startswith("lm_"))
    assert zeros == exported["num_zeros"]
    assert str(model.dtype) == f"torch.{exported['dtype']}"
    assert not exported["folder"].with_name("model.tmp").exists()


def test_the_config_is_plain_llama(exported):
    config = json.loads((exported["folder"] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] == exported["tied"]
    assert "sparsity_config" not in config
    assert (exported["folder"] / "generation_config.json").exists()
    assert (exported["folder"] / "tokenizer.json").exists()
