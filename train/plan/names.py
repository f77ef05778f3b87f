"""The weights that a configuration prunes: the names, patterns and pools of `sparsity`. For a LLaMA no model is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from conf.schema import ModelConfig, SparsityConfig
from sparsity.factors import check_factor_names
from sparsity.pattern import parse_pattern
from sparsity.scope import Group, Pool, make_pools
from train.plan.architecture import check_layers_meta, prunable_meta


def count_prunable(model: ModelConfig, sparsity: SparsityConfig) -> int:
    """Return the number of weights in the pruned parameters.

    Raises:
        ValueError: A pattern matches no parameter.
    """
    return sum(math.prod(shape) for shape in prunable_shapes(model, sparsity).values())


def planned_pools(model: ModelConfig, sparsity: SparsityConfig) -> list[Pool]:
    """Return the pools of competing weights with their targets.

    Raises:
        ValueError: A setting of the group `sparsity` does not fit `model`.
    """
    shapes = prunable_shapes(model, sparsity)
    pools = make_pools(
        shapes,
        sparsity.scope,
        pruned_groups(sparsity),
    )
    check_factor_names(shapes, sparsity.factors)
    pattern, targets = parse_pattern(sparsity.pattern), (sparsity.target, *(group.target for group in sparsity.groups))
    if model.path is not None and any(targets):
        check_layers_meta(model, shapes, sparsity)
    if pattern is not None:
        for target in targets:
            pattern.check_sparsity(target)
        for name, shape in shapes.items():
            pattern.check_shape(name, shape)
    return pools


def pruned_groups(sparsity: SparsityConfig) -> tuple[Group, ...]:
    """Return the groups of weights that have their own target."""
    return tuple(Group(tuple(group.include), group.target) for group in sparsity.groups)


def prunable_shapes(model: ModelConfig, sparsity: SparsityConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the pruned parameters.

    A tied lm_head is the same parameter as the embedding: it is pruned only if `include` names one of the two.

    Raises:
        ValueError: A pattern matches no parameter.
    """
    if model.path is not None:
        return {
            name: tuple(param.shape)
            for name, param in prunable_meta(model, sparsity.include, sparsity.requires_dense).items()
        }
    shapes = dict(parameter_shapes(model))
    for option, patterns in (("include", sparsity.include or ()), ("requires_dense", sparsity.requires_dense)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                raise ValueError(
                    f"sparsity.{option}={pattern} matches no parameter: patterns are compared with names like "
                    "'model.layers.0.mlp.up_proj.weight', * matches anything."
                )
    chosen = [name for name in shapes if _is_chosen(name, model, sparsity)]
    if model.tie_word_embeddings:
        chosen = list(
            dict.fromkeys("model.embed_tokens.weight" if name == "lm_head.weight" else name for name in chosen)
        )
    return {name: shapes[name] for name in chosen}


def parameter_shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every parameter of a LLaMA, by transformers' names, including a tied lm_head."""
    hidden, mlp = model.hidden_size, model.intermediate_size
    key_value = hidden // model.num_attention_heads * model.num_key_value_heads
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    yield "model.embed_tokens.weight", (model.vocab_size, hidden)
    for layer in range(model.num_hidden_layers):
        for module, shape in block.items():
            yield f"model.layers.{layer}.{module}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (model.vocab_size, hidden)


def dense_words(shapes: Mapping[str, Sequence[int]], pruned: Iterable[str]) -> str:
    """Return words for the parameters that are not pruned: names of matrices, with * for the layer, and a vector count.

    Args:
        shapes: Every parameter of the model.
        pruned: The names of the pruned ones.
    """
    left = {name: shape for name, shape in shapes.items() if name not in set(pruned)}
    matrices = [re.sub(r"\.\d+\.", ".*.", name) for name, shape in left.items() if len(shape) > 1]
    num_vectors = sum(len(shape) <= 1 for shape in left.values())
    vectors = [f"{num_vectors} {'vector' if num_vectors == 1 else 'vectors'} (norms, biases)"] if num_vectors else []
    return ", ".join([*dict.fromkeys(matrices), *vectors])


def _is_chosen(name: str, model: ModelConfig, sparsity: SparsityConfig) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in sparsity.requires_dense):
        return False
    if sparsity.include is not None:
        return any(fnmatchcase(name, pattern) for pattern in sparsity.include)
    return "_proj." in name or (name == "lm_head.weight" and not model.tie_word_embeddings)
