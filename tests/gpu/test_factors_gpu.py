"""Factors on scores and folded query weights on the device give the same results as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.schema import ModelConfig
from sparsity.factors import scaled
from sparsity.score import magnitude
from sparsity.select import prune_smallest_
from sparsity.shards import ParameterShard
from tests.test_export import tokenizer_in
from train.distributed import World
from train.model.build import build_model, build_skeleton
from train.model.export import export_model
from train.model.weights import allocate, draw_weights

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FACTORS = {"q_proj": 0.0625, "up": 0.1}


def inputs(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = {name: torch.randn(30_000, generator=generator) for name in ("q_proj", "up", "down")}
    change: dict[str, Any] = {
        "normal": lambda t: t,
        "ties": lambda t: (t * 4).round() / 4,
        "bfloat16": lambda t: t.bfloat16(),
        "float16": lambda t: (t * 1e-6).half(),
        "denormal": lambda t: t * 1e-43,
        "infinite": lambda t: torch.where(t > 1, torch.inf, t),
    }
    return {name: change[kind](tensor) for name, tensor in normal.items()}


def masks_on(device: torch.device, kind: str) -> list[Tensor]:
    """Return the masks after each of four events."""
    shards = [
        ParameterShard(name, t.to(device, copy=True), torch.ones(len(t), dtype=torch.bool, device=device), 0, len(t))
        for name, t in inputs(kind).items()
    ]
    found = []
    for num_pruned in (9_000, 40_000, 40_001, 75_000):
        prune_smallest_(shards, num_pruned, score=scaled(magnitude, FACTORS))
        for shard in shards:
            shard.values.masked_fill_(~shard.mask, 0)
        found.append(torch.cat([shard.mask for shard in shards]).cpu())
    return found


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16", "float16", "denormal", "infinite"])
def test_the_device_prunes_by_products_what_the_cpu_prunes(kind):
    for found, expected in zip(masks_on(DEVICE, kind), masks_on(torch.device("cpu"), kind), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("head_dim", [16, 6])
def test_a_folded_model_drawn_on_the_device_is_exported_as_the_cpus(tmp_path, head_dim):
    config = ModelConfig(
        name="tiny", vocab_size=300, hidden_size=4 * head_dim, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, init="authors", query_scale="folded",
    )  # fmt: skip
    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    expected = build_model(config, tokenizer, seed=0)
    model = build_skeleton(config, tokenizer)
    allocate(model, DEVICE)
    draw_weights(model, build_skeleton(config, tokenizer), 0, config.init)
    model.to(DEVICE)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    for name, of in (("device", model), ("cpu", expected)):
        export_model(
            of,
            tokenizer,
            tmp_path / name,
            dtype="float32",
            max_shard_size="5GB",
            world=World(0, 1, torch.device("cpu")),
        )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("device", "cpu")]
    assert files[0] == files[1]
    ids = torch.arange(24).view(2, 12)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "device", dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids.to(DEVICE)).logits, model(ids.to(DEVICE)).logits, rtol=1e-3, atol=1e-4)
