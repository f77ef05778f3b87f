"""The model of a run, built from its configuration, without weights or with random ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conf.schema import ModelConfig
from train.model.parametrisation import fold_queries
from train.model.weights import allocate, draw_weights, skeleton
from train.plan.config_json import causal_class, hf_config


def transformers_config(model: ModelConfig, **token_ids: Any) -> Any:
    """Return a model's transformers config: that of `model.path`, or else a LLaMA's with the settings of the group `model`."""
    if model.path is not None:
        return hf_config(model.path, model.overrides, **token_ids)
    return llama_config(model, **token_ids)


def llama_config(model: ModelConfig, **token_ids: Any) -> LlamaConfig:
    """Return the transformers config of a LLaMA from the group `model`."""
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


def build_skeleton(model: ModelConfig, tokenizer: Any = None) -> PreTrainedModel:
    """Return the model in float32 with its parameters on the meta device; `train.model.weights` fills them.

    Args:
        model: The group `model` of a configuration.
        tokenizer: The run's tokenizer, for its special ids; None before there is one.

    Raises:
        ValueError: `model.attn_implementation` is unknown, or its library is not installed.
    """
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers_config(model, **ids)
    built: PreTrainedModel = skeleton(lambda: _build(model, config))
    if model.query_scale == "folded":
        fold_queries(built)
    if tokenizer is not None:
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        built.generation_config = GenerationConfig(
            **ids, pad_token_id=padding, max_length=model.max_position_embeddings
        )
    return built


def build_model(model: ModelConfig, tokenizer: Any, seed: int) -> PreTrainedModel:
    """Return the whole model on the CPU, with the weights that a run of any world size draws.

    Args:
        model: The group `model` of the configuration.
        tokenizer: The tokenizer, for its special ids.
        seed: The seed of the weights.
    """
    built = build_skeleton(model, tokenizer)
    allocate(built, torch.device("cpu"))
    draw_weights(built, build_skeleton(model, tokenizer), seed, model.init)
    return built


def _build(model: ModelConfig, config: Any) -> PreTrainedModel:
    kind = LlamaForCausalLM if model.path is None else causal_class(config)
    if model.attn_implementation is None:
        return kind._from_config(config, dtype=torch.float32)
    try:
        return kind._from_config(config, dtype=torch.float32, attn_implementation=model.attn_implementation)
    except (ImportError, ValueError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"model.attn_implementation={model.attn_implementation} cannot be used: {words}") from error
