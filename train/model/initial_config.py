"""The comparison of a model folder's config.json with the configured model, in every field that changes the logits.

transformers' own config class reads both sides, so that defaults and older spellings (`rope_theta` beside
`rope_parameters`, `torch_dtype`) mean what they mean to `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from conf.schema import ModelConfig
from train.plan.config_json import check_plain, read_config
from train.plan.folders import CONFIG, model_folder

ADAPTER = "adapter_config.json"
WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields that do not change the logits. All others must be equal, and `max_position_embeddings` must not be exceeded."""
OVERRIDES = {"rope_parameters.rope_theta": "rope_theta"}
"""Keys of the group `model` that have another name in config.json."""


@dataclass(frozen=True)
class Difference:
    """One field of config.json that differs, with the folder's and the run's value."""

    field: str
    theirs: Any
    ours: Any

    @property
    def words(self) -> str:
        """The difference as part of an error message."""
        return f"{self.field} is {_yaml(self.theirs)} in the folder and {_yaml(self.ours)} in the config"

    def override(self, by_path: bool = False) -> str | None:
        """Return the override that takes over the folder's value; None if the group `model` has no such key.

        Args:
            by_path: Whether the model is given by `model.path`, so that any field of config.json can be set.
        """
        if by_path:
            inner = f"{_yaml(self.theirs)}"
            for part in reversed(self.field.split(".")):
                inner = f"{{{part}: {inner}}}"
            return f"model.overrides={inner}"
        key = OVERRIDES.get(self.field, self.field)
        is_key = key in {field.name for field in fields(ModelConfig)} and self.theirs is not None
        return f"model.{key}={_yaml(self.theirs)}" if is_key else None


def check_config(folder: str, ours: Any, by_path: bool = False) -> None:
    """Check that a folder's config.json describes the same function as `ours`, a transformers config.

    Args:
        folder: The folder, or a hub name.
        ours: The config of the model that is built.
        by_path: Whether that model is given by `model.path`.

    Raises:
        ValueError: config.json is missing or garbled, or fields differ. The message names all of them, with both
            values and the overrides that take over the folder's.
    """
    theirs = read_config(folder, "init_from")
    if (model_folder(folder, "init_from") / ADAPTER).exists():
        raise ValueError(
            f"init_from={folder} holds {ADAPTER}, an adapter and not only a whole model: merge it into its base model "
            "(peft's merge_and_unload) and save that."
        )
    check_plain(theirs, folder, "init_from")
    if theirs.get("model_type") != ours.model_type:
        raise ValueError(
            f"init_from={folder} has another architecture, model_type={theirs.get('model_type')} instead of "
            f"{ours.model_type}: give a folder whose {CONFIG} has model_type={ours.model_type}."
        )
    try:
        parsed = type(ours).from_dict(theirs).to_dict()
    except Exception as error:
        raise ValueError(
            f"init_from={folder}: transformers cannot read its {CONFIG} ({' '.join(str(error).split())}): copy it again."
        ) from None
    if found := config_differences(parsed, ours.to_dict()):
        raise ValueError(_sentence(folder, found, by_path))


def config_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """Return the fields that differ and change the model's function.

    Args:
        theirs: The folder's config, as the class of `ours` reads it. Fields that `ours` lacks are not compared: a
            model of that class does not read them.
        ours: The config of the model that is built.
    """
    left = {key: value for key, value in _flat(theirs) if key.split(".")[0] in ours}
    right = dict(_flat(ours))
    # A head_dim derived from hidden size and number of heads differs only if those do, so it is not named again.
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


def _sentence(folder: str, found: list[Difference], by_path: bool) -> str:
    overrides = [override for difference in found if (override := difference.override(by_path))]
    fixed = [f"{difference.field}={_yaml(difference.ours)}" for difference in found if not difference.override(by_path)]
    remedy = f"set {' '.join(overrides)}" if overrides else ""
    if fixed:
        remedy = f"give a folder with {', '.join(fixed)}, which no key of the group model changes" + (
            f", and {remedy}" if remedy else ""
        )
    differences = "; ".join(difference.words for difference in found)
    return f"init_from={folder} is not the configured model, {differences}: {remedy}."


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield fields by dotted names, including those of nested tables."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _yaml(value: Any) -> str:
    """Return a value as it is written in an override."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else f"{value}"
