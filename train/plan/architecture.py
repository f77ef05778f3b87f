"""The sizes that a plan needs of a model given by `model.path`.

Counts come from a model on the meta device, which takes no memory. torch is imported only for such a model: the LLaMAs of
the group `model` have closed forms (`train.plan.counts`, `train.plan.names`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from conf.schema import ModelConfig, SparsityConfig
from conf.schema.model import BY_CONFIG
from sparsity.pattern import parse_pattern
from sparsity.scope import SCOPES
from sparsity.score import SCORES
from train.plan.config_json import causal_class, hf_config, largest, refused
from train.plan.folders import CONFIG

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
OWN_KEYS = ("name", "path", "overrides", "init", "query_scale", "attn_implementation", "match")
"""The keys of the group `model` that apply to a model by `path`; config.json gives all others."""
LENGTH = 2048
"""The tokens of a block if data.sequence_length is null and the model's context is not shorter."""
NO_LIMIT = 1 << 20
"""The context of a model whose config.json gives none, such as one with ALiBi or a state-space model."""
CONTEXTS = ("max_position_embeddings", "max_seq_len", "context_length")
EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
"""The names of the experts of a layer, and of those to which a token is routed, in the configs of transformers."""


@dataclass(frozen=True)
class Description:
    """A model in numbers; a tied parameter is listed once."""

    kind: str
    """The `model_type` of config.json."""
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    """Other names of tied parameters, each with its name in `shapes`."""
    total: int
    linear: int
    linear_per_block: int
    """The linear weights of the largest block."""
    largest_unit: int
    """The parameters of the largest block, or of the largest parameter outside the blocks if that is larger."""
    active_share: float
    """The share of the linear weights that one token uses; it uses only the experts to which it is routed."""
    attention_width: int
    """The number of heads times the width of a head; 0 for a model without attention."""


def resolved(model: ModelConfig) -> ModelConfig:
    """Return `model` with the sizes from its config.json; a model without `path` is returned unchanged.

    Raises:
        ValueError: config.json cannot be fetched or is not that of a causal language model, or a key of the group
            `model` is set that such a model does not read.
    """
    if model.path is None:
        return model
    config = hf_config(model.path, model.overrides)
    sizes: dict[str, Any] = {name: _size(config, name) for name in SIZES}
    _check_sizes(model.path, model.overrides, sizes, _experts(config))
    sizes["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    for field in fields(ModelConfig):
        if field.name in OWN_KEYS:
            continue
        value, unset = getattr(model, field.name), BY_CONFIG if field.name in SIZES else field.default
        if value not in (unset, sizes.get(field.name, unset)):
            raise ValueError(
                f"model.{field.name}={value} has no effect with model.path={model.path}, whose {CONFIG} sets it: set "
                f'"model.overrides={{{field.name}: {value}}}".'
            )
    return replace(model, **sizes)


def unresolved(model: ModelConfig) -> ModelConfig:
    """Return `model` with the sizes of config.json unset again, so that other `overrides` may change them."""
    unset: dict[str, Any] = dict.fromkeys(SIZES, BY_CONFIG)
    return replace(model, **unset, tie_word_embeddings=False)


def meta_model(model: ModelConfig) -> Any:
    """Return the model by `path` on the meta device; it is built only once for the same config."""
    assert model.path is not None
    return _meta_model(model.path, json.dumps(model.overrides))


def transformers_values(model: ModelConfig) -> Any:
    """Return the transformers config of a model by `path`."""
    return meta_model(model).config


def describe(model: ModelConfig) -> Description:
    """Return the description of a model by `path`."""
    assert model.path is not None
    return _describe(model.path, json.dumps(model.overrides))


def default_length(model: ModelConfig) -> int:
    """Return the tokens of a block when data.sequence_length is null."""
    context = model.max_position_embeddings
    return context if model.path is None else min(context, LENGTH)


def prunable_meta(model: ModelConfig, include: Sequence[str] | None, requires_dense: Sequence[str]) -> dict[str, Any]:
    """Return the prunable parameters of a model by `path`, chosen by the same rule as in a run.

    Args:
        model: The model.
        include: The patterns of sparsity.include.
        requires_dense: The patterns of sparsity.requires_dense.

    Raises:
        ValueError: See `sparsity.prunable.prunable_parameters`.
    """
    from sparsity import prunable_parameters

    with warnings.catch_warnings():
        # The run itself will give these warnings.
        warnings.simplefilter("ignore")
        return prunable_parameters(meta_model(model), include, requires_dense)


def check_layers_meta(model: ModelConfig, names: Iterable[str], sparsity: SparsityConfig) -> None:
    """Refuse a pattern, scope or score that does not fit the layers of a model by `path`.

    Raises:
        ValueError: See `sparsity.layers.check_layers`.
    """
    from sparsity.layers import check_layers

    parameters = dict(meta_model(model).named_parameters())
    check_layers(
        meta_model(model),
        {name: parameters[name] for name in names},
        parse_pattern(sparsity.pattern),
        SCOPES.find(sparsity.scope),
        SCORES.find(sparsity.score),
    )


@lru_cache(maxsize=4)
def _meta_model(path: str, overrides: str) -> Any:
    import torch

    changes = json.loads(overrides)
    config = hf_config(path, changes)
    try:
        with torch.device("meta"):
            return causal_class(config)._from_config(config, dtype=torch.float32)
    except Exception as error:
        raise refused(path, changes, "does not describe a model that transformers can build", error) from None


@lru_cache(maxsize=64)
def _describe(path: str, overrides: str) -> Description:
    from sparsity.prunable import own_linear_weights, plain_name

    model = _meta_model(path, overrides)
    config = model.config
    names: dict[int, str] = {}
    spellings = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        spellings[plain_name(name)] = names.setdefault(id(param), plain_name(name))
    parameters = {plain_name(name): param for name, param in model.named_parameters()}
    linear = {name: weight.numel() for name, weight in own_linear_weights(model).items()}
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in block_names(model)]
    per_block = [sum(size for name, size in linear.items() if name.startswith(f"{block}.")) for block in blocks]
    sizes = {name: param.numel() for name, param in parameters.items()}
    outside = [size for name, size in sizes.items() if not name.startswith(tuple(f"{block}." for block in blocks))]
    units = [sum(size for name, size in sizes.items() if name.startswith(f"{block}.")) for block in blocks]
    experts, chosen = _experts(config)
    idle = sum(linear[name] for name in linear if parameters[name].dim() == 3) * (1 - chosen / experts)
    heads = largest(config, "num_attention_heads") or 0
    head_dim = largest(config, "head_dim") or largest(config, "hidden_size") // max(1, heads)
    total = sum(linear.values())
    return Description(
        kind=config.model_type,
        shapes={name: tuple(param.shape) for name, param in parameters.items()},
        aliases={name: first for name, first in spellings.items() if name != first},
        total=sum(param.numel() for param in parameters.values()),
        linear=total,
        linear_per_block=max(per_block, default=total),
        largest_unit=max([*units, *outside]),
        active_share=(total - idle) / total,
        attention_width=heads * head_dim,
    )


def block_names(model: Any) -> set[str]:
    """Return the class names of a model's blocks: those in `_no_split_modules` that some module of the model has.

    A model that names none has the members of its ModuleLists for blocks.
    """
    from torch.nn import ModuleList

    present = {type(module).__name__ for module in model.modules()}
    named = present & set(getattr(model, "_no_split_modules", None) or ())
    return named or {type(block).__name__ for block in _members(model, ModuleList)}


def _members(module: Any, kind: Any) -> Iterator[Any]:
    """Yield the members of the outermost modules of a kind."""
    for child in module.children():
        yield from child.children() if isinstance(child, kind) else _members(child, kind)


def _size(config: Any, name: str) -> int:
    """Return one of `SIZES` under the config's own name for it; for experts, the total width that one token uses."""
    if name == "intermediate_size":
        experts, chosen = _experts(config)
        width = largest(config, "moe_intermediate_size") or largest(config, name) or largest(config, "n_inner")
        return (width or 4 * largest(config, "hidden_size")) * (chosen if experts > 1 else 1)
    if name == "num_key_value_heads":
        return largest(config, name) or _size(config, "num_attention_heads")
    if name == "max_position_embeddings":
        return next((found for key in CONTEXTS if (found := largest(config, key))), NO_LIMIT)
    if name == "num_attention_heads":
        # A model without attention counts as one head, whose keys are as wide as the model.
        return largest(config, name) or 1
    return largest(config, name)


def _check_sizes(path: str, overrides: Mapping[str, Any], sizes: Mapping[str, int], experts: tuple[int, int]) -> None:
    """Refuse sizes with which transformers builds a model that cannot run."""
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    wrong = [
        (sizes["num_hidden_layers"] < 1, f"num_hidden_layers={sizes['num_hidden_layers']} must be at least 1"),
        (heads % shared != 0, f"num_key_value_heads={shared} must divide num_attention_heads={heads}"),
        (experts[1] > experts[0], f"num_experts_per_tok={experts[1]} must not exceed the {experts[0]} experts"),
    ]
    for is_wrong, words in wrong:
        if is_wrong:
            raise refused(path, overrides, "does not describe a model that can be trained", ValueError(words))


def _experts(config: Any) -> tuple[int, int]:
    """Return (experts of a layer, experts to which a token is routed); (1, 1) for a model without experts."""
    experts = next((found for key in EXPERTS if (found := largest(config, key))), 1)
    return experts, next((found for key in CHOSEN_EXPERTS if (found := largest(config, key))), experts)
