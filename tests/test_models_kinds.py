"""Architectures beyond those tested from training to the compact folder: what is special about them is kept or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BambaConfig,
    BartConfig,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoHybridConfig,
    OpenAIGPTConfig,
    PhimoeConfig,
    StableLmConfig,
    XLNetConfig,
    set_seed,
)

from conf.schema import ModelConfig, SparsityConfig
from sparsity.prunable import own_linear_weights, prunable_parameters
from tests.architectures import SIZES, by_path
from tests.small_models import VOCABULARY, saved
from train.checkpoints.contents import buffers_of, parameters_of, rank_tensors
from train.checkpoints.read import CheckpointReader, load_buffers
from train.checkpoints.write import Checkpoint, write_checkpoint
from train.distributed import World
from train.model.build import build_skeleton
from train.model.documents import check_keeps_documents_apart
from train.model.drawable import check_drawable
from train.model.export import export_model
from train.model.initial import initial_weights, load_initial_weights
from train.model.weights import allocate
from train.plan.architecture import NO_LIMIT, describe, resolved
from train.plan.config_json import hf_config
from train.plan.counts import count_parameters
from train.plan.names import planned_pools, prunable_shapes

ALONE = World(0, 1, torch.device("cpu"))
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def deepseek_v3() -> DeepseekV3Config:
    return DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 2}, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip


def olmo_hybrid() -> OlmoHybridConfig:
    return OlmoHybridConfig(
        **SIZES, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip


def folder_of(config: Any, folder: Path) -> Path:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for buffer in buffers_of(model).values():
            # As after training: not the values of a new model.
            buffer.copy_(torch.linspace(0.5, 2, buffer.numel()).view(buffer.shape))
    return saved(model, folder)


def loaded(folder: Path) -> Any:
    model = build_skeleton(resolved(by_path(folder)))
    allocate(model, torch.device("cpu"))
    load_initial_weights(model, str(folder))
    return model


def export(model: Any, folder: Path, out: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export_model(model, tokenizer, out, dtype="float32", max_shard_size="5GB", world=ALONE)
    return AutoModelForCausalLM.from_pretrained(out)


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def test_buffers_that_files_store_are_read_and_exported(tmp_path):
    folder = folder_of(deepseek_v3(), tmp_path / "model")
    model = loaded(folder)
    assert torch.equal(dict(model.named_buffers())[BIAS], torch.tensor([0.5, 1, 1.5, 2]))
    with torch.no_grad():
        for weight in own_linear_weights(model).values():
            weight.masked_fill_(torch.rand_like(weight) < 0.5, 0)
    again = export(model, folder, tmp_path / "out")
    assert torch.equal(dict(again.named_buffers())[BIAS], torch.tensor([0.5, 1, 1.5, 2]))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    tokens = torch.arange(20)[None]
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_buffers_that_files_store_come_back_from_a_checkpoint(tmp_path):
    model = loaded(folder_of(deepseek_v3(), tmp_path / "model"))
    optimizer = torch.optim.AdamW(model.parameters())
    tensors, pieces, _ = rank_tensors(model, optimizer, [], {}, 0)
    write_checkpoint(
        Checkpoint(tmp_path, 1, ALONE, tensors, pieces, {}, lambda path: Path(path).write_text("{}") and None)
    )
    fresh = build_skeleton(resolved(by_path(tmp_path / "model")))
    assert not dict(fresh.named_buffers())[BIAS].any()
    load_buffers(CheckpointReader(tmp_path / "checkpoint-1"), buffers_of(fresh))
    assert torch.equal(dict(fresh.named_buffers())[BIAS], torch.tensor([0.5, 1, 1.5, 2]))


def test_a_missing_buffer_is_named(tmp_path):
    folder = folder_of(deepseek_v3(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[BIAS]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"has no weight {BIAS}"):
        initial_weights(build_skeleton(resolved(by_path(folder))), str(folder), by_path=True)


def test_weights_that_transformers_joins_from_several_are_exported_under_their_own_names(tmp_path):
    folder = folder_of(olmo_hybrid(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"save_pretrained\(..., save_original_format=False\)"):
        loaded(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(folder, save_original_format=False)
    model = loaded(folder)
    again = export(model, folder, tmp_path / "out")
    for (name, mine), original in zip(again.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, original), name
    loaded(tmp_path / "out")


def test_a_tied_weight_stored_under_its_other_name_is_read(tmp_path):
    folder = folder_of(Gemma3TextConfig(**SIZES, head_dim=8), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, folder / "model.safetensors")
    assert torch.equal(loaded(folder).model.embed_tokens.weight, embedding)


SIZED: dict[str, tuple[Callable[[], Any], int, int, int]] = {
    "bloom": (lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2), NO_LIMIT, 2, 16),
    "mamba": (lambda: MambaConfig(**SMALL, state_size=8), NO_LIMIT, 1, 0),
    "gemma3n_text": (
        lambda: Gemma3nTextConfig(
            **{**SIZES, "intermediate_size": [24, 32]}, head_dim=8, num_kv_shared_layers=0, laurel_rank=4,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, altup_num_inputs=2,
        ),
        64, 2, 16,
    ),
    "bamba": (lambda: BambaConfig(**SIZES, **MAMBA), 64, 2, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_a_config_lacks_or_gives_by_layer_are_understood(tmp_path, name):
    config, context, heads, width = SIZED[name]
    folder = folder_of(config(), tmp_path / "model")
    model = resolved(by_path(folder))
    assert (model.max_position_embeddings, model.num_attention_heads) == (context, heads)
    assert describe(model).attention_width == width
    real = AutoModelForCausalLM.from_pretrained(folder)
    assert count_parameters(model).total == sum(param.numel() for param in real.parameters())
    assert model.intermediate_size == {"gemma3n_text": 32, "bamba": 24}.get(name, model.intermediate_size)


@pytest.mark.parametrize("kind", [BertConfig, BartConfig, XLNetConfig])
def test_a_model_that_attends_to_later_tokens_is_refused(tmp_path, kind):
    kind().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"also attends to later tokens, .* give a decoder-only model"):
        hf_config(str(tmp_path), {})


def test_overrides_that_contradict_each_other_are_refused_before_a_model_is_built(tmp_path):
    GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.overrides=\{n_head: 5\} .*: change the overrides, or leave them out"):
        describe(by_path(tmp_path, overrides={"n_head": 5}))


KEPT_APART: dict[str, tuple[Callable[[], Any], str | None]] = {
    "llama": (lambda: LlamaConfig(**SIZES), None),
    "gpt2": (lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, pad_token_id=0), None),
    "mistral": (lambda: MistralConfig(**SIZES, sliding_window=16), None),
    "deepseek_v3": (deepseek_v3, None),
    "dynamic": (lambda: LlamaConfig(**SIZES, rope_parameters=DYNAMIC), None),
    "bamba": (lambda: BambaConfig(**SIZES, **MAMBA), "mixes tokens by a convolution too"),
    "falcon": (lambda: FalconConfig(**SMALL, num_attention_heads=2), "does not pass the ends"),
    "stablelm": (lambda: StableLmConfig(**SIZES), "does not pass the ends"),
    "phimoe": (lambda: PhimoeConfig(**SIZES, **EXPERTS, sliding_window=16), "its window"),
    "llama4": (lambda: Llama4TextConfig(**SIZES, **EXPERTS, head_dim=8, intermediate_size_mlp=24), "its window"),
    "gpt_oss": (lambda: GptOssConfig(**SIZES, **EXPERTS, head_dim=8), "its attention is eager and not SDPA"),
}


@pytest.mark.parametrize("name", KEPT_APART)
def test_documents_are_refused_where_a_model_would_mix_them(name):
    config, reason = KEPT_APART[name]
    if reason is None:
        check_keeps_documents_apart(config())
        return
    with pytest.raises(
        ValueError, match=f"data.attention=document does not work with .*{reason}.* use data.attention=causal"
    ):
        check_keeps_documents_apart(config())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda: ApertusConfig(**SIZES), r"model\.layers\.0\.mlp\.act_fn\.alpha_p"),
        (lambda: OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2), r"transformer\.h\.0\.attn.*"),
    ],
)
def test_a_model_that_cannot_start_from_random_weights_is_refused_before_text_is_read(tmp_path, config, name):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"_init_weights gives {name} no values, .*: set init_from"):
        check_drawable(resolved(by_path(tmp_path)))


@pytest.mark.parametrize(
    "config", [lambda: LlamaConfig(**SIZES), lambda: MixtralConfig(**SIZES, **EXPERTS), deepseek_v3]
)
def test_a_model_that_can_start_from_random_weights_is_not_refused(tmp_path, config):
    config().save_pretrained(tmp_path)
    check_drawable(resolved(by_path(tmp_path)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must not exceed the 4 experts"),
    ],
)
def test_sizes_with_which_a_model_cannot_run_are_refused_in_the_plan(tmp_path, overrides, words):
    MixtralConfig(**SIZES, **EXPERTS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{words}\): change the overrides, or leave them out"):
        resolved(by_path(tmp_path, overrides=overrides))


def test_several_differences_are_taken_over_by_one_override(tmp_path):
    folder = folder_of(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), tmp_path / "model"
    )
    ours = {"num_hidden_layers": 1, "rope_parameters": {"rope_theta": 1e4}}
    with pytest.raises(
        ValueError,
        match=r'set "model\.overrides=\{num_hidden_layers: 2, rope_parameters: \{rope_theta: 500000\.0\}\}"\.',
    ):
        initial_weights(build_skeleton(resolved(by_path(folder, overrides=ours))), str(folder), by_path=True)


def test_a_tied_head_named_in_include_is_pruned_under_the_name_that_checkpoints_use(tmp_path):
    folder = folder_of(Gemma3TextConfig(**SIZES, head_dim=8), tmp_path / "model")
    sparsity = SparsityConfig(target=0.5, include=["lm_head.weight"])
    (pool,) = planned_pools(resolved(by_path(folder)), sparsity)
    assert pool.names == ("model.embed_tokens.weight",)
    model = loaded(folder)
    assert list(prunable_parameters(model, include=["lm_head.weight"])) == ["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" in parameters_of(model)
    llama = ModelConfig(
        name="tied",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    assert list(prunable_shapes(llama, sparsity)) == ["model.embed_tokens.weight"]
