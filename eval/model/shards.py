"""Loading a model in FSDP2 shards: every rank reads only its own rows from the files, so none ever holds the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from train.distributed import World

INDEX = "model.safetensors.index.json"


def load_sharded(folder: str, config: Any, dtype: torch.dtype, world: World, load_whole: Callable[[], Any]) -> Any:
    """Load the model with its rows divided among all ranks; each decoder layer is gathered when it runs.

    If tensors in the files have other names or layouts than in the model, as in compact files or files that transformers
    converts, every rank first loads the whole model on its CPU (`load_whole`) and keeps its shard.

    Collective: over all ranks.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    files = weight_files(Path(folder))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    is_plain = getattr(config, "quantization_config", None) is None
    names = file_names(model, files) if is_plain else None
    if names is None:
        return shard(load_whole().to(dtype), mesh)
    shard(model, mesh)
    read_shards(model, {name: (files[stored], stored) for name, stored in names.items()}, world.device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(world.device)
    return model


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Apply FSDP2 over the mesh: one group for each module in transformers' `_no_split_modules`, one for the rest."""
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each stored tensor; {} if the folder has no such file."""
    if (folder / INDEX).is_file():
        # Only the file's name is used, because an index must not lead out of its folder.
        stored = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / Path(file).name for name, file in stored.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with readable(single), safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def file_names(model: Any, stored: Mapping[str, Any]) -> dict[str, str] | None:
    """Return each parameter's name in the files, tied parameters once; None if one is not found under its own name.

    A model of the base class stores its weights without the prefix of the causal model.
    """
    prefix = f"{model.base_model_prefix}."
    found: dict[int, tuple[str, str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        for candidate in (name, name.removeprefix(prefix)):
            if candidate in stored:
                found.setdefault(id(param), (name, candidate))
    if len(found) < len({id(param) for param in model.parameters()}):
        return None
    return dict(found.values())


@torch.no_grad()
def read_shards(model: nn.Module, places: Mapping[str, tuple[Path, str]], device: torch.device) -> None:
    """Replace the meta tensors by this rank's rows from the files; `places` is {parameter: (file, stored name)}."""
    meta = dict(model.named_parameters(remove_duplicate=False))
    loaded: dict[int, nn.Parameter] = {}
    with ExitStack() as stack:
        open_files: dict[Path, Any] = {}
        for name, (path, stored) in places.items():
            with readable(path):
                if path not in open_files:
                    open_files[path] = stack.enter_context(safe_open(path, framework="pt"))
                rows = open_files[path].get_slice(stored)
                loaded[id(meta[name])] = nn.Parameter(_own_rows(rows, stored, meta[name], device), requires_grad=False)
    model.load_state_dict({name: loaded[id(param)] for name, param in meta.items()}, strict=False, assign=True)


def _own_rows(rows: Any, stored: str, param: Tensor, device: torch.device) -> Tensor:
    if tuple(rows.get_shape()) != tuple(param.shape):
        raise ValueError(
            f"{stored} is stored as {tuple(rows.get_shape())} and the model has {tuple(param.shape)}: config.json is not of "
            "these weights, copy the folder again."
        )
    if not isinstance(param, DTensor):
        return rows[:].to(device, param.dtype)
    mesh, num_rows = param.device_mesh, -(-param.shape[0] // param.device_mesh.size())
    start = min(mesh.get_local_rank() * num_rows, param.shape[0])
    own = rows[start : min(start + num_rows, param.shape[0])].to(device, param.dtype)
    return DTensor.from_local(own, mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride())


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error of safetensors or the operating system into a ValueError that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again.") from None
