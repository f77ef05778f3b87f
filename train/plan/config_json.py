"""The transformers config of a model given by `model.path`: its config.json is read, checked and changed by `model.overrides`.

transformers is imported only for such a model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from train.plan.folders import CONFIG, model_folder

COMPACT = "sparsellm-compact"
"""The quant_method of a compact folder: `METHOD` of sparsity.compact.contents, which imports torch."""
LOOKING_AHEAD = ("bert-generation", "cpmant", "prophetnet", "xlnet")
"""Models that attend to later tokens, beside those that transformers lists as masked language models or encoder-decoders."""
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""The fields of config.json that list one value for each layer."""


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
        raise refused(path, overrides, "is not a config that transformers accepts", error) from None
    for key, value in {"use_cache": False, "dtype": "float32", **token_ids}.items():
        setattr(config, key, value)
    return config


def refused(path: str, overrides: Mapping[str, Any], what: str, error: Exception) -> ValueError:
    """Return the error about a config.json that transformers refuses, with the reason that it gives."""
    reason = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    if overrides:
        changed = ", ".join(f"{name}: {value}" for name, value in overrides.items())
        return ValueError(
            f"model.path={path} with model.overrides={{{changed}}} {what} ({reason}): change the overrides, or leave them out."
        )
    return ValueError(f"model.path={path} {what} ({reason}): give another model, or change values by model.overrides.")


def largest(config: Any, name: str) -> int:
    """Return a size of a transformers config, the largest if it differs among layers; 0 if the config has none."""
    try:
        found = getattr(config, name, None)
    except Exception:
        # transformers refuses to give one value for all layers if they have their own.
        found = [getattr(config.per_layer_config[layer], name, None) for layer in range(config.num_hidden_layers)]
    values = found if isinstance(found, list | tuple) else [found]
    return max((int(value) for value in values if isinstance(value, int | float)), default=0)


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
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except FileNotFoundError:
        raise ValueError(
            f"{key}={spec} holds no {CONFIG}: give a transformers folder with config and safetensors, such as a run's model/."
        ) from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{key}={spec}: {CONFIG} is garbled: copy it again.")
    return config


def _special_float(table: dict[str, Any]) -> Any:
    """Return the float that transformers stores as a table, because JSON has no infinity; any other table unchanged."""
    return float(table["__float__"]) if set(table) == {"__float__"} else table


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
    from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

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
    looks_ahead = found in MODEL_FOR_MASKED_LM_MAPPING or kind in LOOKING_AHEAD
    if looks_ahead or _defaults(found).get("is_encoder_decoder"):
        raise ValueError(
            f"{key}={spec} has model_type={kind} in {CONFIG}, an encoder or encoder-decoder, which also attends to later "
            "tokens, so it cannot learn to predict them: give a decoder-only model, such as GPT-2 or Qwen3."
        )
    return found


def causal_class(config: Any) -> Any:
    """Return transformers' causal language model class for `config`."""
    return _causal_class(type(config))


def _overrides(given: Mapping[str, Any], kind: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed fields of config.json; lists with a value for each layer are cut to the new number of layers."""
    spellings = getattr(kind, "attribute_map", None) or {}
    known = {*_defaults(kind), *given, *spellings}
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


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the values of a config class; an empty table if its defaults contradict each other, as Gemma 4's do."""
    try:
        return dict(kind().to_dict())
    except Exception:
        return {}


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
