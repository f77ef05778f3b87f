"""Reading a checkpoint: each rank reads its rows from whichever files hold them, so any number of ranks can resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparsity.mask import state_holder, unpack_mask
from sparsity.shards import ParameterShard, local_tensor
from train.checkpoints import layout
from train.checkpoints.contents import Pieces, local_rows


class CheckpointReader:
    """An open checkpoint; `state` is its state.json, and any rows of its tensors are read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / layout.STATE).read_text(encoding="utf-8"))
        if self.state.get("format") != layout.FORMAT:
            raise ValueError(
                f"{folder} has format {self.state.get('format')}, but this version reads {layout.FORMAT}: resume with the "
                "version that wrote it, or set overwrite=true to start over."
            )
        self._pieces = Pieces(**self.state["pieces"])
        self._files: dict[int, Any] = {}

    @property
    def step(self) -> int:
        """The number of steps that were trained before it was written."""
        return int(self.state["step"])

    def tensor(self, name: str, rank: int) -> Tensor | None:
        """Return a whole tensor of one rank's file; None if the file does not have it."""
        file = self._file(rank)
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a dict

    def rows(self, key: str, name: str, start: int, stop: int) -> Tensor | None:
        """Return some rows of a tensor, from whichever files hold them.

        Args:
            key: The kind of tensor: `model`, or `optim.` and the name of a state.
            name: The name of the parameter.
            start: The first row.
            stop: The row after the last one.

        Returns:
            The rows; None if start .. stop is empty.
        """
        pieces = [
            self._file(rank).get_slice(f"{key}/{name}")[first - offset : last - offset]
            for rank, offset, first, last in self._parts(name, start, stop)
        ]
        return torch.cat(pieces) if pieces else None

    def mask(self, name: str, start: int, stop: int, per_row: int) -> Tensor:
        """Return a part of a mask, bool [stop - start].

        Args:
            name: The name of the parameter.
            start: The first weight, counted in the flat parameter; it begins a row.
            stop: The weight after the last one, which also begins a row.
            per_row: The number of weights in a row.
        """
        pieces = [torch.empty(0, dtype=torch.bool)]
        for rank, offset, first, last in self._parts(name, start // per_row, stop // per_row):
            begin, end = (first - offset) * per_row, (last - offset) * per_row
            bits = self._file(rank).get_slice(f"mask/{name}")[begin // 8 : -(-end // 8)]
            pieces.append(unpack_mask(bits, begin, end))
        return torch.cat(pieces)

    def _parts(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (rank, first row in its file, first row to take, row after the last) for the files that cover the rows."""
        size = self._pieces.rows[name]
        for index in range(start // size, -(-stop // size)):
            offset = index * size
            first, last = max(start, offset), min(stop, offset + size)
            if first < last:
                yield self._pieces.writers[index], offset, first, last

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / layout.rank_file(rank), framework="pt").__enter__()
        return self._files[rank]


@torch.no_grad()
def load_weights(reader: CheckpointReader, parameters: Mapping[str, Tensor]) -> None:
    """Copy this rank's rows of every parameter from the checkpoint.

    Raises:
        ValueError: The model's parameters or their shapes differ from those of the checkpoint.
    """
    saved = set(reader.state["pieces"]["rows"])
    if saved != set(parameters):
        other = sorted(saved ^ set(parameters))[0]
        raise ValueError(
            f"{reader.folder} belongs to another model: {other} is only in "
            f"{'the checkpoint' if other in saved else 'the model'}; resume with the model that wrote it, or set "
            "overwrite=true to start over."
        )
    for name, param in parameters.items():
        shape = tuple(reader.state["shapes"][name])
        if shape != tuple(param.shape):
            raise ValueError(
                f"{reader.folder} holds {name} with shape {shape}, but this run has {tuple(param.shape)}: it belongs to "
                "another model; resume with the model that wrote it, or set overwrite=true to start over."
            )
        _fill(reader, "model", name, param, param)


@torch.no_grad()
def load_buffers(reader: CheckpointReader, buffers: Mapping[str, Tensor]) -> None:
    """Copy the model's buffers; those that an older checkpoint lacks keep the values of a new model, as in its run."""
    for name, buffer in buffers.items():
        if (found := reader.tensor(f"buffer/{name}", 0)) is not None:
            buffer.copy_(found)


@torch.no_grad()
def load_optimizer(
    reader: CheckpointReader, optimizer: Any, parameters: Mapping[str, Tensor], rates: bool = True
) -> None:
    """Load the optimizer's state for this rank's rows.

    Args:
        reader: The checkpoint.
        optimizer: The optimizer to fill.
        parameters: The model's parameters by name.
        rates: Whether to load the learning rates too, not only moments and counters.
    """
    saved, inner = reader.state["optimizer"], state_holder(optimizer)
    groups = {param: group for group in inner.param_groups for param in group["params"]}
    for name, param in parameters.items():
        group = groups.get(param)
        if group is None:
            continue
        state: dict[str, Any] = {}
        for key, by_name in saved["scalars"].items():
            if name in by_name:
                on_device = group.get("fused") or group.get("capturable")
                device = param.device if on_device else torch.device("cpu")
                state[key] = torch.tensor(by_name[name], dtype=torch.float32, device=device)
        for key, names in saved["states"].items():
            if name in names:
                state[key] = torch.zeros_like(param, dtype=getattr(torch, names[name]))
                _fill(reader, f"optim.{key}", name, state[key], param)
        if state:
            inner.state[param] = state
    for group, saved_rates in zip(inner.param_groups, saved["groups"], strict=True):
        group.update(saved_rates if rates else {})


def load_masks(reader: CheckpointReader, shards: list[ParameterShard], row_sizes: Callable[[str], int]) -> None:
    """Fill the masks of `shards` in place.

    Args:
        reader: The checkpoint.
        shards: This rank's shards of the pruned parameters.
        row_sizes: Returns the number of weights in a row of a parameter, given its name.

    Raises:
        ValueError: The checkpoint lacks a mask.
    """
    for shard in shards:
        if reader.tensor(f"mask/{shard.name}", 0) is None:
            raise ValueError(
                f"{reader.folder} has no mask of {shard.name}: resuming from it would train a dense model; resume from a "
                "checkpoint of this sparse run, or set overwrite=true to start over."
            )
        stop = shard.offset + shard.values.numel()
        shard.mask.copy_(reader.mask(shard.name, shard.offset, stop, row_sizes(shard.name)))


def _fill(reader: CheckpointReader, key: str, name: str, tensor: Tensor, param: Tensor) -> None:
    local = local_tensor(tensor.detach())
    found = reader.rows(key, name, *local_rows(param))
    if found is None:
        found = torch.empty(0, *local.shape[1:], dtype=local.dtype)
    local.copy_(found)
