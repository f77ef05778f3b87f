"""A model trained on the device is exported, loaded there as a plain and a compact folder, and generates text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

import sparsity.compact  # noqa: F401 - transformers then loads compact folders
from conf.schema import ModelConfig
from sparsity import Geometric, SparsityCallback
from sparsity.compact import compact_folder
from sparsity.prunable import own_linear_weights
from train.data.tokenizer import train_bpe, wrap_bpe
from train.distributed import World
from train.model.build import llama_config
from train.model.export import export_model

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = torch.arange(24).view(2, 12) % 61


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Any]:
    """Export a model from FSDP2 shards on the device; return its folder and the float32 weights of the shards."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("export")
    train_bpe(["a few words to train on"], 260, folder / "tokenizer.json")
    tokenizer = wrap_bpe(folder / "tokenizer.json", 64)
    config = ModelConfig(
        name="tiny", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(llama_config(config), dtype=torch.float32)
    model.generation_config.max_length = 32
    model.to(DEVICE)
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(DEVICE.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    callback = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    callback.bind(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(input_ids=IDS.to(DEVICE), labels=IDS.to(DEVICE)).loss.backward()
    optimizer.step()
    callback.pruner.prune(0.2, optimizer)
    world = World(0, 1, DEVICE)
    export_model(model, tokenizer, folder / "plain", dtype="float32", max_shard_size="50KB", world=world)
    weights = {name: param.detach().full_tensor().cpu() for name, param in model.named_parameters()}
    dist.destroy_process_group()
    compact_folder(folder / "plain", folder / "compact")
    return {"folder": folder, "weights": weights, "num_kept": sum(callback.kept.values())}


def load(folder: Path, device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}).eval()


@pytest.mark.parametrize("form", ["plain", "compact"])
def test_every_weight_comes_back_on_the_device_to_the_last_bit(exported, form):
    model = load(exported["folder"] / form, DEVICE)
    found = dict(model.named_parameters())
    assert found.keys() == exported["weights"].keys()
    for name, expected in exported["weights"].items():
        assert found[name].device.type == DEVICE.type
        assert torch.equal(found[name].detach().cpu(), expected), name
    num_kept = sum(int(weight.detach().count_nonzero()) for weight in own_linear_weights(model).values())
    assert num_kept == exported["num_kept"]


@pytest.mark.parametrize("form", ["plain", "compact"])
def test_the_device_continues_text_as_the_cpu_does(exported, form):
    mine, oracle = load(exported["folder"] / form, DEVICE), load(exported["folder"] / "plain", torch.device("cpu"))
    with torch.no_grad():
        expected = oracle(IDS).logits
        torch.testing.assert_close(mine(IDS.to(DEVICE)).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
        written = mine.generate(IDS[:1, :4].to(DEVICE), max_new_tokens=12, do_sample=False)
        by_cpu = oracle.generate(IDS[:1, :4], max_new_tokens=12, do_sample=False)
    assert written.cpu().tolist() == by_cpu.tolist()
