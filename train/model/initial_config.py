"""Whether a model folder's config.json describes the configured model: every field that changes its function is compared.

transformers' own config class reads both sides, so that defaults and older spellings (`rope_theta` beside
`rope_parameters`, `torch_dtype`) mean what they mean to `from_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
    "max_position_embeddings", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields that leave the logits as they are. All others must be equal; `max_position_embeddings` must not be exceeded."""
NOT_PLAIN = ("auto_map", "quantization_config")
"""Fields that no plain float model of transformers has: code of the folder's own, weights in another form."""
OVERRIDES = {"rope_parameters.rope_theta": "rope_theta"}
"""Keys of the group `model` that have another name in config.json."""


@dataclass(frozen=True)
class Difference:
    """One field of config.json with the folder's and the run's value."""

    field: str
    theirs: Any
    ours: Any

    @property
    def words(self) -> str:
        return f"{self.field} is {_yaml(self.theirs)} there and {_yaml(self.ours)} here"

    @property
    def override(self) -> str | None:
        """The override that takes over the folder's value; None if the group `model` has no such key."""
        key = OVERRIDES.get(self.field, self.field)
        is_key = key in {field.name for field in fields(ModelConfig)} and self.theirs is not None
        return f"model.{key}={_yaml(self.theirs)}" if is_key else None


def check_config(folder: str, ours: Any) -> None:
    """Refuse a folder whose config.json describes another function than `ours`, a transformers config.

    Raises:
        ValueError: config.json is missing or garbled, or fields differ. All of them are named, with both values and the
            overrides that take over the folder's.
    """
    theirs = _read(folder)
    if (Path(folder).expanduser() / ADAPTER).exists():
        raise ValueError(
            f"init_from={folder} holds {ADAPTER}, an adapter beside or instead of a whole model: merge it into its base "
            "model (peft's merge_and_unload) and save that."
        )
    for key in NOT_PLAIN:
        if theirs.get(key):
            raise ValueError(
                f"init_from={folder} has {key} in {CONFIG}, so it is no plain model of transformers: give a folder "
                "without it, in float32, bfloat16 or float16."
            )
    if theirs.get("model_type") != ours.model_type:
        raise ValueError(
            f"init_from={folder} is of another architecture, model_type is {theirs.get('model_type')} there and "
            f"{ours.model_type} here: give a folder whose {CONFIG} has model_type={ours.model_type}."
        )
    try:
        parsed = type(ours).from_dict(theirs).to_dict()
    except Exception as error:
        raise ValueError(
            f"init_from={folder}: transformers cannot read its {CONFIG} ({' '.join(str(error).split())}): copy it again."
        ) from None
    if found := config_differences(parsed, ours.to_dict()):
        raise ValueError(_sentence(folder, found))


def config_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """Return the fields that change the function and differ.

    Args:
        theirs: The folder's config, as the class of `ours` reads it. Fields that `ours` lacks are not compared: a model
            of that class does not read them.
        ours: The config of the model that is built.
    """
    left = {key: value for key, value in _flat(theirs) if key.split(".")[0] in ours}
    right = dict(_flat(ours))
    # A head width that follows from the width and the heads is settled when those are.
    derived = {"head_dim"} if _derives_head_dim(left) and _derives_head_dim(right) else set()
    names = [name for name in {**right, **left} if name.split(".")[0] not in WITHOUT_EFFECT | derived]
    found = [Difference(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]
    key = "max_position_embeddings"
    if (right.get(key) or 0) > (left.get(key) or float("inf")):
        found.append(Difference(key, left[key], right[key]))
    return found


def _derives_head_dim(config: Mapping[str, Any]) -> bool:
    heads = config.get("num_attention_heads")
    return bool(heads) and config.get("head_dim") == config.get("hidden_size", 0) // heads


def _sentence(folder: str, found: list[Difference]) -> str:
    overrides = [difference.override for difference in found if difference.override]
    fixed = [f"{difference.field}={_yaml(difference.ours)}" for difference in found if not difference.override]
    remedy = f"set {' '.join(overrides)}" if overrides else ""
    if fixed:
        remedy = f"give a folder with {', '.join(fixed)}, which no key of the group model changes" + (
            f", and {remedy}" if remedy else ""
        )
    return (
        f"init_from={folder} is not of the configured model, "
        f"{'; '.join(difference.words for difference in found)}: {remedy}."
    )


def _read(folder: str) -> dict[str, Any]:
    path = Path(folder).expanduser() / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"init_from={folder} holds no {CONFIG}: give a transformers folder with config and safetensors, such as a "
            "run's model/."
        ) from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"init_from={folder}: {CONFIG} is garbled: copy it again.")
    return config


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields by dotted names, those of nested tables included."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _yaml(value: Any) -> str:
    """A value as an override writes it."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else f"{value}"
