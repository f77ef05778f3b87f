"""Any causal language model of transformers, given by its config.json: the config, and the sizes that a plan needs.

Counts come from a model on the meta device, which takes no memory. transformers is imported only for a model given by
`model.path`: the LLaMAs of the group `model` have closed forms (`train.plan.counts`, `train.plan.names`).
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from conf.schema import ModelConfig, SparsityConfig
from conf.schema.model import BY_CONFIG
from sparsity.pattern import parse_pattern
from sparsity.scope import SCOPES
from sparsity.score import SCORES
from train.plan.folders import CONFIG, model_folder

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip
OWN_KEYS = ("name", "path", "overrides", "init", "query_scale", "attn_implementation", "match")
"""The keys of the group `model` that apply to a model by `path`; config.json gives all others."""
COMPACT = "sparsellm-compact"
"""The quant_method of a compact folder: `METHOD` of sparsity.compact.contents, which imports torch."""
LENGTH = 2048
"""The tokens of a block if data.sequence_length is null and the model's context is not shorter."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""The fields of config.json that list one value for each layer."""


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
    active_share: float
    """The share of the linear weights that one token uses; it uses only the experts to which it is routed."""
    attention_width: int
    """The number of heads times the width of a head."""


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
    sizes["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    for field in fields(ModelConfig):
        if field.name in OWN_KEYS:
            continue
        value, unset = getattr(model, field.name), BY_CONFIG if field.name in SIZES else field.default
        if value not in (unset, sizes.get(field.name, unset)):
            raise ValueError(
                f"model.{field.name}={value} has no effect with model.path={model.path}, whose {CONFIG} sets it: set "
                f"model.overrides={{{field.name}: {value}}}."
            )
    return replace(model, **sizes)


def unresolved(model: ModelConfig) -> ModelConfig:
    """Return `model` with the sizes of config.json unset again, so that other `overrides` may change them."""
    unset: dict[str, Any] = dict.fromkeys(SIZES, BY_CONFIG)
    return replace(model, **unset, tie_word_embeddings=False)


def hf_config(path: str, overrides: Mapping[str, Any], **token_ids: Any) -> Any:
    """Return the transformers config of a model by `model.path`, with `model.overrides` applied.

    Raises:
        ValueError: The model is not plain or not a causal language model of transformers, or an override does not fit.
    """
    given = read_config(path, "model.path")
    check_plain(given, path, "model.path")
    kind = config_class(given, path, "model.path")
    values = {**given, **_overrides(given, kind, overrides)}
    try:
        config = kind.from_dict(values)
    except Exception as error:
        raise ValueError(
            f"model.path={path} with model.overrides={dict(overrides)} is not a config that transformers accepts: "
            f"{' '.join(str(error).split())}"
        ) from None
    for key, value in {"use_cache": False, "dtype": "float32", **token_ids}.items():
        setattr(config, key, value)
    return config


def read_config(spec: str, key: str) -> dict[str, Any]:
    """Return the config.json of a folder or hub name.

    Args:
        spec: The folder or hub name.
        key: The user's name for `spec` in errors.

    Raises:
        ValueError: There is none, or it is garbled.
    """
    path = model_folder(spec, key) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{key}={spec} holds no {CONFIG}: give a transformers folder with config and safetensors, such as a run's model/."
        ) from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{key}={spec}: {CONFIG} is garbled: copy it again.")
    return config


def check_plain(config: Mapping[str, Any], spec: str, key: str) -> None:
    """Refuse quantized weights, and a folder with its own model code.

    An `auto_map` that names only classes of transformers itself, as Phi-3's does, is accepted: its code is not needed.

    Args:
        config: The contents of config.json.
        spec: The folder or hub name.
        key: The user's name for `spec` in errors.

    Raises:
        ValueError: The folder has one of these.
    """
    if quantized := config.get("quantization_config"):
        if isinstance(quantized, Mapping) and quantized.get("quant_method") == COMPACT:
            raise ValueError(
                f"{key}={spec} is compact: expand it first, `python -m eval.compact model={spec} out=DIR expand=true`, "
                f"and give {key}=DIR."
            )
        raise ValueError(
            f"{key}={spec} has quantization_config in {CONFIG}, so it is not a plain transformers model: give a folder "
            "without it, in float32, bfloat16 or float16."
        )
    if config.get("auto_map") and not _names_only_known_classes(config):
        raise ValueError(
            f"{key}={spec} has auto_map in {CONFIG}, which loads custom code, so it is not a plain transformers model: "
            "give a folder whose model_type and architectures are in transformers."
        )


def config_class(config: Mapping[str, Any], spec: str, key: str) -> Any:
    """Return transformers' config class for a config.json.

    Args:
        config: The contents of config.json.
        spec: The folder or hub name.
        key: The user's name for `spec` in errors.

    Raises:
        ValueError: transformers has no causal language model of that `model_type`, or the model reads more than text.
    """
    from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}={spec} has model_type={kind} in {CONFIG}, which this transformers does not have: give another model, or "
            "install a newer transformers."
        )
    found = CONFIG_MAPPING[kind]
    if found not in MODEL_FOR_CAUSAL_LM_MAPPING or "text_config" in (getattr(found, "sub_configs", None) or {}):
        raise ValueError(
            f"{key}={spec} has model_type={kind} in {CONFIG}, which is not a text-only causal language model: give one, "
            "or save only the language model of this one."
        )
    return found


def causal_class(config: Any) -> Any:
    """Return transformers' causal language model class for `config`."""
    return _causal_class(type(config))


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

    config = hf_config(path, json.loads(overrides))
    with torch.device("meta"):
        return causal_class(config)._from_config(config, dtype=torch.float32)


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
    experts, chosen = _experts(config)
    idle = sum(linear[name] for name in linear if parameters[name].dim() == 3) * (1 - chosen / experts)
    heads = _size(config, "num_attention_heads")
    head_dim = getattr(config, "head_dim", None) or _size(config, "hidden_size") // heads
    total = sum(linear.values())
    return Description(
        kind=config.model_type,
        shapes={name: tuple(param.shape) for name, param in parameters.items()},
        aliases={name: first for name, first in spellings.items() if name != first},
        total=sum(param.numel() for param in parameters.values()),
        linear=total,
        linear_per_block=max(per_block, default=total),
        active_share=(total - idle) / total,
        attention_width=heads * head_dim,
    )


def block_names(model: Any) -> set[str]:
    """Return the class names of a model's blocks: those in `_no_split_modules` that some module of the model has."""
    present = {type(module).__name__ for module in model.modules()}
    return present & set(getattr(model, "_no_split_modules", None) or ())


def _size(config: Any, name: str) -> int:
    """Return one of `SIZES` under the config's own name for it; for experts, the total width that one token uses."""
    hidden = config.hidden_size
    if name == "intermediate_size":
        experts, chosen = _experts(config)
        width = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
        width = width or getattr(config, "n_inner", None) or 4 * hidden
        return int(width) * (chosen if experts > 1 else 1)
    if name == "num_key_value_heads":
        return int(getattr(config, name, None) or config.num_attention_heads)
    return int(getattr(config, name))


def _experts(config: Any) -> tuple[int, int]:
    """Return (experts of a layer, experts to which a token is routed); (1, 1) for a model without experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    return int(experts), min(int(experts), int(getattr(config, "num_experts_per_tok", None) or experts))


def _overrides(given: Mapping[str, Any], kind: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed fields of config.json; lists with a value for each layer are cut to the new number of layers."""
    spellings = getattr(kind, "attribute_map", None) or {}
    known = {*kind().to_dict(), *given, *spellings}
    changed: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in known or name in ("model_type", "auto_map", "architectures"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give names of {kind.__name__}."
            raise ValueError(f"model.overrides.{name} is not a value of this {CONFIG} that can be changed: {hint}")
        if isinstance(value, Mapping) and isinstance(given.get(name), Mapping):
            value = {**given[name], **value}
        changed[spellings.get(name, name)] = value
    layers = changed.get("num_hidden_layers", changed.get("n_layer"))
    for name in PER_LAYER:
        if layers is not None and isinstance(given.get(name), list) and name not in changed:
            # A list that is too short is left out: the config class then repeats its own pattern.
            changed[name] = given[name][:layers] if layers <= len(given[name]) else None
    return changed


def _causal_class(kind: type) -> Any:
    from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    return found[0] if isinstance(found, tuple) else found


def _names_only_known_classes(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
    if kind is None or kind not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(config["auto_map"], Mapping):
        return False
    own = {"AutoConfig": kind.__name__, "AutoModelForCausalLM": _causal_class(kind).__name__}
    asked = {name: str(value).rpartition(".")[2] for name, value in config["auto_map"].items()}
    return asked.items() <= own.items()
