"""Parameter counts of a model: in closed form for a LLaMA, from a model on the meta device for any other."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig
from train.plan.architecture import describe


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: `linear` counts all linear weights, lm_head included; `total` adds embedding and norms."""

    total: int
    linear: int
    linear_per_layer: int


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Return a model's counts; a tied lm_head is the embedding, so it is not counted as a linear weight."""
    if model.path is not None:
        found = describe(model)
        return ParameterCounts(found.total, found.linear, found.linear_per_block)
    head_dim = model.hidden_size // model.num_attention_heads
    query = model.hidden_size * model.num_attention_heads * head_dim
    key = model.hidden_size * model.num_key_value_heads * head_dim
    per_layer = 2 * query + 2 * key + 3 * model.hidden_size * model.intermediate_size
    embedding = model.vocab_size * model.hidden_size
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    linear = model.num_hidden_layers * per_layer + (0 if model.tie_word_embeddings else embedding)
    return ParameterCounts(total=linear + embedding + norms, linear=linear, linear_per_layer=per_layer)


def flops_per_token(model: ModelConfig, linear_params: float, sequence_length: int) -> float:
    """Return the FLOPs per token of the forward and backward pass.

    A weight costs 2 FLOPs forward and 4 backward, and attention adds two products: 6 x linear weights + 12 x layers x
    hidden size x sequence length (arXiv 2204.02311, appendix B). As is usual for MFU, nothing is subtracted for the
    causal mask, and recomputed activations do not count. Only the experts to which a token is routed count, and the
    width of attention is that of all its heads.

    Args:
        model: The model.
        linear_params: The number of its linear weights that are active.
        sequence_length: The number of tokens in a block.
    """
    active, width = 1.0, model.hidden_size
    if model.path is not None:
        active, width = describe(model).active_share, describe(model).attention_width
    logits = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
    return 6 * (active * linear_params + logits) + 12 * model.num_hidden_layers * width * sequence_length
