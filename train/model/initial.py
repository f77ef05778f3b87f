"""The start from a finished model: its weights are read from safetensors files, and its exact zeros can become masks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf.schema import ModelConfig
from sparsity.compact.contents import METHOD
from sparsity.prunable import plain_name
from sparsity.shards import local_tensor
from train.checkpoints.contents import buffers_of, local_rows
from train.model.export import full_names
from train.model.initial_config import check_config
from train.model.parametrisation import folded, query_folds
from train.model.stored import Source, sources
from train.plan.folders import model_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NOT_WEIGHTS = re.compile(r".*rotary_emb\.inv_freq")
"""Buffers that old versions of transformers stored with the weights; config.json, which is compared, determines them."""


class InitialWeights:
    """The weights of a transformers folder, under the names that a model has for them.

    Only safetensors files are opened, each once: nothing in the folder is executed.
    """

    def __init__(self, folder: str, model: Any) -> None:
        """Open a model folder.

        Args:
            folder: The folder, or a hub name.
            model: A model of its architecture on any device; it determines which stored tensors make up a weight.

        Raises:
            ValueError: There are no safetensors files, one cannot be read, or they are compact.
        """
        self.folder = folder
        self._files = _files(model_folder(folder, "init_from", weights=True))
        self._open: dict[Path, Any] = {}
        for path in sorted(set(self._files.values())):
            self._file(path)
        try:
            self._sources = sources(model, self._files)
        except ValueError as error:
            raise ValueError(f"init_from={folder}: {error}") from None
        unread = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._unread = [NOT_WEIGHTS, *(re.compile(f".*{pattern}") for pattern in unread)]

    def check(self, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> None:
        """Compare the folder's weights with a model's.

        Args:
            shapes: The shapes of the model's parameters and buffers by their transformers names, each tied one once.
            aliases: Other names of tied parameters, each with the name it has in `shapes`.

        Raises:
            ValueError: A weight is missing, left over, or of another shape.
        """
        for name, first in aliases.items():
            # Some folders store a tied weight only under another of its names.
            if first not in self._sources and name in self._sources:
                self._sources[first] = self._sources.pop(name)
        for name, shape in shapes.items():
            if name not in self._sources:
                raise ValueError(
                    f"init_from={self.folder} has no weight {name}: give a folder of the configured model."
                )
            if (found := self._shape(name)) != shape:
                raise ValueError(
                    f"init_from={self.folder} has {name} with shape {found}, but the configured model has {shape}: choose "
                    "the folder's model in the group model."
                )
        self._check_left_over(shapes, aliases)

    def whole(self, name: str) -> Tensor:
        """Read a whole buffer, which may be a single number."""
        stored = self._sources[name].names[0]
        return self._file(self._files[stored]).get_tensor(stored)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read only some rows of a weight; for experts, a row is an expert.

        Args:
            name: The weight's name in the model.
            start: The first row.
            stop: The row after the last one.
        """
        source = self._sources[name]
        if source.name is not None:
            return self._slice(source.name, start, stop)
        experts = [torch.cat([self._slice(part) for part in parts]) for parts in source.experts[start:stop]]
        return torch.stack(experts) if experts else torch.empty(0, *self._shape(name)[1:])

    @torch.no_grad()
    def fill(self, model: Any) -> None:
        """Copy the weights into `model`, in its dtype and scale; a sharded parameter takes only this rank's rows."""
        folds = query_folds(model)
        for name, tensor in full_names(model).items():
            local_tensor(tensor).copy_(folded(self.rows(name, *local_rows(tensor)), folds.get(name, 1.0)))
        for name, buffer in buffers_of(model).items():
            buffer.copy_(self.whole(name))

    def zero_share(self, names: Iterable[str], rows_at_once: int = 1024) -> float:
        """Return the share of exact zeros in the named weights, read piece by piece."""
        zeros = total = 0
        for name in names:
            num_rows, *_ = shape = self._shape(name)
            step = rows_at_once if len(shape) < 3 else 1
            for start in range(0, num_rows, step):
                piece = self.rows(name, start, min(num_rows, start + step))
                zeros += piece.numel() - int(torch.count_nonzero(piece))
                total += piece.numel()
        return zeros / max(1, total)

    def _check_left_over(self, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> None:
        left = [name for name in self._sources if name not in shapes and not self._is_unread(name)]
        # Some folders store a tied weight under both names.
        other = [name for name in left if name not in aliases or not self._are_equal(name, aliases[name])]
        if other:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise ValueError(
                f"init_from={self.folder} has a weight {other[0]}{more} that the configured model does not have, so it "
                "would be lost: give a folder of the configured model."
            )

    def _is_unread(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self._unread)

    def _are_equal(self, name: str, other: str) -> bool:
        if self._shape(name) != (shape := self._shape(other)):
            return False
        starts = range(0, shape[0], 1024)
        return all(torch.equal(self.rows(name, at, at + 1024), self.rows(other, at, at + 1024)) for at in starts)

    def _shape(self, name: str) -> tuple[int, ...]:
        source: Source = self._sources[name]
        if source.name is not None:
            return self._stored_shape(source.name)
        parts = [self._stored_shape(part) for part in source.experts[0]]
        return (len(source.experts), sum(rows for rows, *_ in parts), *parts[0][1:])

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._file(self._files[stored]).get_slice(stored).get_shape())

    def _slice(self, stored: str, start: int = 0, stop: int | None = None) -> Tensor:
        try:
            return self._file(self._files[stored]).get_slice(stored)[start:stop]
        except SafetensorError as error:
            raise self._unreadable(self._files[stored], error) from error

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = file = safe_open(path, framework="pt").__enter__()
            except (SafetensorError, FileNotFoundError) as error:
                raise self._unreadable(path, error) from error
            if METHOD in (file.metadata() or {}):
                raise ValueError(
                    f"init_from={self.folder} is compact: expand it first, `python -m eval.compact model={self.folder} "
                    "out=DIR expand=true`."
                )
        return self._open[path]

    def _unreadable(self, path: Path, error: Exception) -> ValueError:
        return ValueError(f"init_from={self.folder}: {path.name} cannot be read ({error}): copy it again.")


def initial_weights(model: Any, folder: str, by_path: bool = False) -> InitialWeights:
    """Open a folder's weights for `model`, whose parameters may be on any device, sharded or not.

    Args:
        model: The model to fill.
        folder: The folder, or a hub name.
        by_path: Whether the model is given by `model.path`.

    Raises:
        ValueError: The folder is not of such a model: its config, or the names or shapes of its weights, differ.
    """
    check_config(folder, model.config, by_path)
    weights = InitialWeights(folder, model)
    names = {id(param): plain_name(name) for name, param in model.named_parameters()}
    spellings = {plain_name(name): names[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}
    aliases = {name: first for name, first in spellings.items() if name != first}
    weights.check(
        {name: tuple(tensor.shape) for name, tensor in {**full_names(model), **buffers_of(model)}.items()}, aliases
    )
    return weights


def check_initial_model(folder: str, model: ModelConfig) -> None:
    """Check, before the model is built, that a folder's config and weights fit the model `model`.

    Raises:
        ValueError: They do not; the message gives the difference, both values and the remedy.
    """
    from train.model.build import build_skeleton

    initial_weights(build_skeleton(model), folder, model.path is not None)


def load_initial_weights(model: Any, folder: str) -> None:
    """Copy a transformers folder's weights into `model`, in its dtype; a sharded parameter takes only this rank's rows.

    Raises:
        ValueError: The folder is not of such a model.
    """
    initial_weights(model, folder).fill(model)


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each weight, including weights that the index leaves out."""
    if (folder / INDEX).is_file():
        try:
            weight_map = {
                str(name): str(file)
                for name, file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"init_from={folder}: {INDEX} is garbled: copy it again.") from None
        if strange := [file for file in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", file)]:
            raise ValueError(
                f"init_from={folder}: {INDEX} names {strange[0]}, which is not a safetensors file in that folder: give a "
                "folder that transformers' save_pretrained wrote."
            )
        stored = {name: folder / file for file in sorted(set(weight_map.values())) for name in _names(folder, file)}
        return {**stored, **{name: folder / file for name, file in weight_map.items()}}
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names(folder, SINGLE), folder / SINGLE)
    if any((folder / name).is_file() for name in PICKLES):
        raise ValueError(
            f"init_from={folder} holds its weights only as a pickle (.bin), which could run code when it is read: save "
            "them as safetensors first, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)."
        )
    raise ValueError(
        f"init_from={folder} holds no {SINGLE}: give a transformers folder with safetensors, such as a run's model/."
    )


def _names(folder: Path, file: str) -> list[str]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"init_from={folder}: {file} cannot be read ({error}): copy it again.") from error
