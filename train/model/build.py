"""A LLaMA from the configuration, without weights or with random ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from conf.schema import ModelConfig
from train.model.parametrisation import fold_queries
from train.model.weights import allocate, draw_weights, skeleton


def llama_config(model: ModelConfig, **token_ids: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_word_embeddings,
        initializer_range=model.initializer_range,
        use_cache=False,
        **token_ids,
    )


def model_on_meta(model: ModelConfig) -> LlamaForCausalLM:
    """Build the model without memory, to see in a moment that transformers takes its configuration.

    Raises:
        ValueError: The attention function is not known, or its library is not installed.
    """
    options = {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    try:
        with torch.device("meta"):
            return LlamaForCausalLM._from_config(llama_config(model), dtype=torch.float32, **options)
    except (ImportError, ValueError) as error:
        if model.attn_implementation is None:
            raise
        words = " ".join(str(error).split())
        raise ValueError(f"model.attn_implementation={model.attn_implementation} cannot be used: {words}") from error


def build_skeleton(model: ModelConfig, tokenizer: Any) -> LlamaForCausalLM:
    """Return the model in float32 with its parameters on the meta device; `train.model.weights` fills them."""
    config = llama_config(model, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    options = {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    llama = skeleton(lambda: LlamaForCausalLM._from_config(config, dtype=torch.float32, **options))
    if model.query_scale == "folded":
        fold_queries(llama)
    llama.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max_length=model.max_position_embeddings,
    )
    return llama


def build_model(model: ModelConfig, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """Return the whole model on the CPU, with the weights that a run of any world size draws for `seed`."""
    llama = build_skeleton(model, tokenizer)
    allocate(llama, torch.device("cpu"))
    draw_weights(llama, build_skeleton(model, tokenizer), seed, model.init)
    return llama
