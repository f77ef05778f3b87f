"""torch.compile makes one graph that serves all blocks, with FSDP2's hooks between them, and the training is the same."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed import run_ranks

NUM_LAYERS = 12


def train(folder: Path, fsdp: bool, compiled: bool) -> dict[str, Any]:
    """Train for three steps; `aot_eager` makes inductor's graphs and runs them operation by operation."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": str(fsdp).lower(), "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
    }  # fmt: skip
    import torch
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    from sparsity.prunable import linear_weights
    from tests.small_trainer import three_steps
    from train.distributed import join_world
    from train.speed.compiled import compile_by_blocks

    join_world(60)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).view(2, 32)] * 8
    arguments = three_steps(folder, compiled)
    compile_by_blocks(model, arguments)
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    return {
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "names": list(linear_weights(model)),
    }


@pytest.mark.parametrize("option", ["backend", "mode"])
def test_a_backend_or_mode_that_is_not_there_is_one_sentence(option):
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.speed.compiled import compile_by_blocks

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    asked = {"torch_compile_backend": "inductor", "torch_compile_mode": None, f"torch_compile_{option}": "nonsense"}
    arguments = SimpleNamespace(torch_compile=True, use_liger_kernel=False, **asked)
    with pytest.raises(ValueError, match=rf"torch_compile_{option}=nonsense .*not accepted by torch.compile"):
        compile_by_blocks(LlamaForCausalLM(config), arguments)  # type: ignore[arg-type]


def test_max_autotune_tunes_without_the_cuda_graphs_that_blocks_would_share(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.speed.compiled import compile_by_blocks

    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "false")
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    arguments = SimpleNamespace(
        torch_compile=True, use_liger_kernel=False, torch_compile_backend="inductor", torch_compile_mode="max-autotune"
    )
    compile_by_blocks(LlamaForCausalLM(config), arguments)  # type: ignore[arg-type]
    assert arguments.torch_compile_mode == os.environ["ACCELERATE_DYNAMO_MODE"] == "max-autotune-no-cudagraphs"


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["one process", "FSDP2 on two ranks"])
def test_blocks_share_a_graph_that_nothing_breaks_and_train_as_without(tmp_path, num_ranks):
    plain, compiled = (
        run_ranks(train, num_ranks, tmp_path, num_ranks > 1, compiled, joined=False)[0] for compiled in (False, True)
    )
    assert plain["graphs"] == 0
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert compiled["names"] == plain["names"]
    assert compiled["breaks"] == 0
    # In addition to the block there are the embedding, the last norm, the rotary table, the head and the loss.
    assert 2 <= compiled["graphs"] <= 6
