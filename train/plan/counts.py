"""How many parameters a LLaMA has, in closed form: no tensor is made, so a plan of any size costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """`linear` are the weights of the linear layers, lm_head included: what is pruned. `total` adds embedding and norms."""

    total: int
    linear: int
    linear_per_layer: int


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts for a LLaMA without biases; a tied lm_head is the embedding, so it is no linear weight of its own."""
    head_dim = model.hidden_size // model.num_attention_heads
    query = model.hidden_size * model.num_attention_heads * head_dim
    key = model.hidden_size * model.num_key_value_heads * head_dim
    per_layer = 2 * query + 2 * key + 3 * model.hidden_size * model.intermediate_size
    embedding = model.vocab_size * model.hidden_size
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    linear = model.num_hidden_layers * per_layer + (0 if model.tie_word_embeddings else embedding)
    return ParameterCounts(total=linear + embedding + norms, linear=linear, linear_per_layer=per_layer)


def flops_per_token(model: ModelConfig, linear_params: float, sequence_length: int) -> float:
    """Return the FLOPs of forward and backward: 2 and 4 a weight, and the two products of attention.

    That is 6 x linear weights + 12 x layers x hidden size x sequence length (arXiv 2204.02311, appendix B). Nothing is
    taken off for the causal mask, and recomputed activations do not count, as is usual for MFU.
    """
    logits = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
    return 6 * (linear_params + logits) + 12 * model.num_hidden_layers * model.hidden_size * sequence_length
