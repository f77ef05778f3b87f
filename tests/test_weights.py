"""Weights that are drawn or read into shards: they are the same for any number of ranks, and no rank holds the whole model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks

SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


def sharded(folder: str | None = None, seed: int = 3, **changes: Any) -> dict[str, torch.Tensor]:
    """Shard a model over all ranks, fill it by drawing or from a folder, and return its weights gathered."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.model.export import full_names, full_tensor
    from train.model.initial import initial_weights
    from train.model.weights import allocate, draw_weights, skeleton

    def build() -> Any:
        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))

    model = skeleton(build)
    weights = None if folder is None else initial_weights(model, folder)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    allocate(model, torch.device("cpu"))
    if weights is None:
        draw_weights(model, skeleton(build), seed)
    else:
        weights.fill(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    tokens = torch.arange(20)[None]
    logits = model(tokens).logits.detach()
    return {**{name: full_tensor(tensor) for name, tensor in full_names(model).items()}, "logits": logits}


def whole(seed: int = 3, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.model.weights import allocate, draw_weights, skeleton

    def build() -> Any:
        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))

    model = skeleton(build)
    allocate(model, torch.device("cpu"))
    draw_weights(model, skeleton(build), seed)
    return model


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_any_number_of_ranks_draws_the_weights_of_one_process_to_the_last_bit(num_ranks):
    expected = whole()
    for found in run_ranks(sharded, num_ranks):
        assert found.keys() == {*dict(expected.named_parameters()), "logits"}
        assert all(torch.equal(found[name], param) for name, param in expected.named_parameters())
        # The rotary table is not a parameter; without it the logits would be different.
        torch.testing.assert_close(found["logits"], expected(torch.arange(20)[None]).logits)


def sharded_tied(folder: str | None = None) -> dict[str, torch.Tensor]:
    return sharded(folder, tie_word_embeddings=True)


def test_a_tied_embedding_is_drawn_once_and_stays_one_parameter():
    expected = dict(whole(tie_word_embeddings=True).named_parameters())
    assert "lm_head.weight" not in expected
    for found in run_ranks(sharded_tied, 2):
        assert all(torch.equal(found[name], param) for name, param in expected.items())


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_two_ranks_read_from_a_folder_what_it_holds(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    for found in run_ranks(sharded_tied if tied else sharded, 2, str(tmp_path)):
        assert all(torch.equal(found[name], param.float()) for name, param in model.named_parameters())


def test_the_distribution_is_transformers_own_and_follows_from_the_seed_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model, again, other = whole(), whole(), whole(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    values = dict(model.named_parameters())
    drawn = [name for name, param in values.items() if param.dim() == 2]
    for name in drawn:
        spread = 6 * 0.3 / values[name].numel() ** 0.5
        assert abs(float(values[name].detach().mean())) < spread
        assert float(values[name].detach().std()) == pytest.approx(0.3, abs=spread)
        assert torch.equal(again.get_parameter(name), values[name])
        assert not torch.equal(other.get_parameter(name), values[name])
    assert len({float(values[name].detach().sum()) for name in drawn}) == len(drawn)
    assert all((param == 1).all() for name, param in values.items() if "norm" in name)


def test_models_that_initialise_by_place_and_share_weights_are_drawn_as_they_ask():
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    from train.model.weights import allocate, draw_weights, skeleton

    def gpt2() -> Any:
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=8, n_head=2, n_positions=32))

    def qwen2() -> Any:
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))

    models = [skeleton(gpt2), skeleton(qwen2)]
    for model, build in zip(models, (gpt2, qwen2), strict=True):
        allocate(model, torch.device("cpu"))
        draw_weights(model, skeleton(build), 0)
        assert not any(param.isnan().any() for param in model.parameters())
        assert torch.equal(dict(model.named_buffers()).get("b", torch.zeros(1)), torch.zeros(1))
    block = models[0].transformer.h[3]
    # GPT-2 divides the weights that add to the residual by sqrt(2 layers), which works because a block is drawn as a whole.
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert models[0].lm_head.weight is models[0].transformer.wte.weight
    assert not models[1].model.layers[0].self_attn.q_proj.bias.any()


def test_a_parameter_that_the_model_gives_no_values_is_an_error():
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.model.weights import allocate, draw_weights, skeleton

    class Forgetful(LlamaForCausalLM):
        def _init_weights(self, module: nn.Module) -> None:
            if module is not self.lm_head:
                super()._init_weights(module)

    def build() -> Any:
        return Forgetful(LlamaConfig(**SHAPE))

    model = skeleton(build)
    allocate(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"_init_weights gives lm_head\.weight no values"):
        draw_weights(model, skeleton(build), 0)


def train(folder: Path, early: bool, compiled: bool = False, width: int = 24) -> dict[str, Any]:
    """Train three steps; with `early` the model is a skeleton until its optimizer is made, otherwise it is whole."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
    }  # fmt: skip
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    from tests.small_trainer import three_steps
    from train.distributed import join_world
    from train.model.weights import draw_weights, shard_and_allocate, skeleton
    from train.speed.compiled import compile_by_blocks

    sizes = {**SHAPE, "hidden_size": width, "initializer_range": 0.02}

    def build() -> Any:
        return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))

    class Late(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            shard_and_allocate(self.accelerator, self.model)
            draw_weights(self.model, skeleton(build), 3)
            return super().create_optimizer(*args, **kwargs)

    join_world(60)
    model = skeleton(build) if early else whole(**sizes, use_cache=False)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(32).view(2, 16)] * 16
    arguments = three_steps(folder, compiled)
    compile_by_blocks(model, arguments)
    trainer = (Late if early else Trainer)(model, arguments, train_dataset=rows)
    trainer.train()
    optimizer = trainer.optimizer
    assert optimizer is not None
    held = [id(param) for group in optimizer.param_groups for param in group["params"]]
    return {
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "same_parameters": sorted(held) == sorted(id(param) for param in model.parameters()),
    }


@pytest.mark.parametrize("num_ranks", [2, 5], ids=["two ranks", "ranks without rows"])
def test_training_from_a_skeleton_is_training_from_the_whole_model(tmp_path, num_ranks):
    # Four rows of key and value on five ranks leave the last rank without any.
    width = 24 if num_ranks == 2 else 8
    late, early = (run_ranks(train, num_ranks, tmp_path, early, False, width, joined=False) for early in (False, True))
    assert [found["losses"] for found in early] == [found["losses"] for found in late]
    assert all(found["same_parameters"] for found in early)


def test_a_skeleton_compiles_by_blocks_as_the_whole_model_does(tmp_path):
    late, early = (run_ranks(train, 2, tmp_path, early, True, joined=False)[0] for early in (False, True))
    assert early == late
    assert early["breaks"] == 0


def peaks(skeletal: bool) -> dict[str, int]:
    """Return the growth of this rank's peak memory while it builds, shards and fills a model, and the model's bytes."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.benchmarks.common import peak_resident_bytes, reset_peak, resident_bytes
    from train.model.weights import allocate, draw_weights, skeleton

    sharded()
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )

    def build() -> Any:
        return LlamaForCausalLM(config)

    before = resident_bytes()
    reset_peak()
    model = skeleton(build) if skeletal else build()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    if skeletal:
        allocate(model, torch.device("cpu"))
        draw_weights(model, skeleton(build), 0)
    unit = max(sum(p.numel() for p in block.parameters()) for block in (model.model.layers[0], model.lm_head))
    return {
        "peak": peak_resident_bytes() - before,
        "model": 4 * sum(p.numel() for p in model.parameters()),
        "unit": 4 * unit,
    }


def test_a_rank_holds_its_shard_and_one_layer_never_the_model():
    for found in run_ranks(peaks, 2, True):
        assert found["model"] > 290e6
        assert found["peak"] < found["model"] / 2 + 2 * found["unit"] + 24e6
    assert all(found["peak"] > found["model"] for found in run_ranks(peaks, 2, False))
