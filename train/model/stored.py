"""The mapping from stored weights to a model's weights, by transformers' own conversions between files and models.

The experts of a mixture of experts are one parameter [expert, out, in] in the model, but one or two tensors for each
expert in its files. Other stored names may be old spellings, or may lack the model's prefix. Persistent buffers, such as
the bias of a router that balances its experts, are stored like weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsity.prunable import plain_name
from train.checkpoints.contents import buffers_of

STACKS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
"""The conversions that stack experts along dim 0, after concatenating the parts of each along its rows."""


@dataclass(frozen=True)
class Source:
    """The stored tensors of one weight: either a single tensor, or for each expert the tensors that make it."""

    name: str | None = None
    experts: tuple[tuple[str, ...], ...] = ()
    """For each expert, the tensors [out, in] to concatenate along `out`."""

    @property
    def names(self) -> list[str]:
        """The names of all stored tensors that make the weight."""
        return [self.name] if self.name is not None else [name for parts in self.experts for name in parts]


def sources(model: Any, stored: Iterable[str]) -> dict[str, Source]:
    """Return {name in the model: its stored tensors}; a stored name that matches nothing in the model becomes its own key.

    Args:
        model: The model, on any device.
        stored: The names in the files.

    Raises:
        ValueError: transformers makes a weight from several stored ones in another way than by stacking experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    own = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)} | set(buffers_of(model))
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Source] = {}
    stacked: dict[str, tuple[Any, dict[tuple[int, int], str]]] = {}
    for name in stored:
        if name in own:
            found[name] = Source(name)
            continue
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        target, converter, part = _converted(renamed, converters)
        target = _prefixed(target, own, prefix)
        if converter is None:
            found[target if target in own else name] = Source(name)
        else:
            stacked.setdefault(target, (converter, {}))[1][_expert_of(renamed), part] = name
    for target, (converter, parts) in stacked.items():
        found[target] = _stacked(target, converter, parts)
    return found


def stored_form(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a weight of the model in the form in which files store it: experts one by one, as every reader expects.

    A weight that transformers itself would join with others, or split, keeps its name and shape in the model, which
    transformers reads too: it cannot be joined here, where weights are written one at a time.

    Args:
        model: The model, for its architecture.
        name: The weight's name in the model.
        tensor: The whole weight, on any device.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    for converter in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(converter, WeightConverter) and _kinds(converter) not in STACKS:
            _, pattern = converter.reverse_transform().rename_source_key(name)
            if pattern is not None:
                return {name: tensor}
    return dict(revert_weight_conversion(model, {name: tensor}))


def _converted(name: str, converters: Iterable[Any]) -> tuple[str, Any, int]:
    """Return (name in the model, converter, index of `name` among its parts); the converter is None for most names."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, converter, converter.source_patterns.index(pattern)
    return name, None, 0


def _prefixed(name: str, own: set[str], prefix: str) -> str:
    if name in own:
        return name
    if f"{prefix}{name}" in own:
        return f"{prefix}{name}"
    return name.removeprefix(prefix) if name.removeprefix(prefix) in own else name


def _expert_of(name: str) -> int:
    found = re.search(r"experts\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _kinds(converter: Any) -> list[tuple[str, Any]]:
    return [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]


def _stacked(target: str, converter: Any, parts: Mapping[tuple[int, int], str]) -> Source:
    """Return the source of experts stacked along dim 0, whose parts are concatenated along dim 1."""
    num_experts, num_parts = 1 + max(expert for expert, _ in parts), len(converter.source_patterns)
    whole = {(expert, part) for expert in range(num_experts) for part in range(num_parts)} == set(parts)
    if _kinds(converter) not in STACKS or not whole:
        raise ValueError(
            f"{target} is combined from stored weights in a way that is not supported, or some of them are missing: load "
            "the folder with transformers and write it again by save_pretrained(..., save_original_format=False)."
        )
    return Source(
        experts=tuple(tuple(parts[expert, part] for part in range(num_parts)) for expert in range(num_experts))
    )
