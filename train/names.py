"""How many weights a configuration prunes, in closed form: the same names and patterns as `sparsity.prunable`."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from conf.schema import ModelConfig, SparsityConfig


def count_prunable(model: ModelConfig, sparsity: SparsityConfig) -> int:
    """Weights in the parameters that are pruned; a ValueError names a pattern that matches no parameter.

    A tied lm_head is the embedding: it is pruned only where `include` names one of the two, and then once.
    """
    sizes = dict(parameter_sizes(model))
    for option, patterns in (("include", sparsity.include or ()), ("requires_dense", sparsity.requires_dense)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in sizes):
                raise ValueError(
                    f"sparsity.{option}={pattern} matches no parameter: patterns are compared with names like "
                    "'model.layers.0.mlp.up_proj.weight', * matches anything."
                )
    chosen = [name for name in sizes if _is_chosen(name, model, sparsity)]
    if model.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= set(chosen):
        chosen.remove("lm_head.weight")
    return sum(sizes[name] for name in chosen)


def parameter_sizes(model: ModelConfig) -> Iterator[tuple[str, int]]:
    """(name, number of weights) of every parameter of a LLaMA, by transformers' names; a tied lm_head is listed too."""
    hidden, mlp = model.hidden_size, model.intermediate_size
    key_value = hidden // model.num_attention_heads * model.num_key_value_heads
    block = {
        "self_attn.q_proj": hidden * hidden,
        "self_attn.k_proj": hidden * key_value,
        "self_attn.v_proj": hidden * key_value,
        "self_attn.o_proj": hidden * hidden,
        "mlp.gate_proj": hidden * mlp,
        "mlp.up_proj": hidden * mlp,
        "mlp.down_proj": hidden * mlp,
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }
    yield "model.embed_tokens.weight", model.vocab_size * hidden
    for layer in range(model.num_hidden_layers):
        for module, size in block.items():
            yield f"model.layers.{layer}.{module}.weight", size
    yield "model.norm.weight", hidden
    yield "lm_head.weight", model.vocab_size * hidden


def _is_chosen(name: str, model: ModelConfig, sparsity: SparsityConfig) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in sparsity.requires_dense):
        return False
    if sparsity.include is not None:
        return any(fnmatchcase(name, pattern) for pattern in sparsity.include)
    return "_proj." in name or (name == "lm_head.weight" and not model.tie_word_embeddings)
