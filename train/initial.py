"""Starting from a finished model: its weights from safetensors alone, its exact zeros as masks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsity.compact.contents import METHOD
from train.export import full_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@torch.no_grad()
def load_initial_weights(model: Any, folder: str) -> None:
    """Copy a transformers folder's weights into `model`, in its dtype; a ValueError where they are not of such a model.

    Only safetensors files are opened: nothing of the folder is executed.
    """
    tensors = full_names(model)
    files = _files(Path(folder), list(tensors))
    for name, tensor in tensors.items():
        path = files.get(name)
        if path is None:
            raise ValueError(f"init_from={folder} has no weight {name}: give a folder of the configured model.")
        try:
            with safe_open(path, framework="pt") as file:
                if METHOD in (file.metadata() or {}):
                    raise ValueError(
                        f"init_from={folder} is compact: make it plain first, `python -m eval.compact model={folder} "
                        "out=DIR expand=true`."
                    )
                found = file.get_tensor(name)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"init_from={folder}: {path.name} cannot be read ({error}): copy it again.") from error
        if found.shape != tensor.shape:
            raise ValueError(
                f"init_from={folder} has {name} as {tuple(found.shape)}, the configured model {tuple(tensor.shape)}: "
                "set the model group to the folder's model."
            )
        tensor.copy_(found)


def zero_share(parameters: Mapping[str, torch.Tensor]) -> float:
    """The share of exact zeros in whole parameters."""
    zeros = sum(param.numel() - int(torch.count_nonzero(param)) for param in parameters.values())
    return zeros / max(1, sum(param.numel() for param in parameters.values()))


def _files(folder: Path, names: list[str]) -> dict[str, Path]:
    """Which file holds each weight."""
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
                f"init_from={folder}: {INDEX} names {strange[0]}, which is no safetensors file of that folder: give a "
                "folder that transformers' save_pretrained wrote."
            )
        return {name: folder / file for name, file in weight_map.items()}
    if (folder / SINGLE).is_file():
        try:
            with safe_open(folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), folder / SINGLE)
        except SafetensorError as error:
            raise ValueError(f"init_from={folder}: {SINGLE} cannot be read ({error}): copy it again.") from error
    raise ValueError(
        f"init_from={folder} holds no {SINGLE}: give a transformers folder with safetensors, such as a run's model/."
    )
