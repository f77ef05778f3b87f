"""Tiny random models of the named architectures that are supported, as transformers folders with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)

from tests.small_models import VOCABULARY, saved

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama3": lambda: LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=16),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "phi3": lambda: Phi3Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def folder_of(name: str, folder: Path, **options: Any) -> Path:
    """Write a model's folder and return it; `options` are those of save_pretrained, and `dtype`."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    return saved(model.to(options.pop("dtype", model.dtype)), folder, **options)


def by_path(path: Path | str, **keys: Any) -> Any:
    """Return the config group `model` of `model=hf model.path=PATH`."""
    from conf.schema import ModelConfig
    from train.plan.architecture import SIZES as KEYS

    return ModelConfig(**{"name": "auto", "path": str(path), **dict.fromkeys(KEYS, 0), **keys})
