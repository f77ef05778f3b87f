"""The contents of a checkpoint: which rows of which tensors each rank writes, and the optimizer's figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsity.mask import pack_mask, state_holder
from sparsity.prunable import plain_name
from sparsity.shards import ParameterShard, local_tensor, shard_dim, shard_offset
from train.faults.stop import RunStopped


@dataclass(frozen=True)
class Pieces:
    """The rows in each rank's file.

    Piece i of a parameter is in the file of rank `writers[i]`. It begins at row i x rows[name] and has `rows[name]`
    rows, or fewer at the end.
    """

    writers: list[int]
    rows: dict[str, int]

    def of(self, name: str, rank: int, num_rows: int) -> tuple[int, int] | None:
        """Return (start, stop), the rows that a rank writes of a parameter; None if it writes none of it.

        Args:
            name: The name of the parameter.
            rank: The rank.
            num_rows: The number of rows of the whole parameter.
        """
        if rank not in self.writers:
            return None
        index, size = self.writers.index(rank), self.rows[name]
        if index and size >= num_rows:
            return None
        return min(index * size, num_rows), min((index + 1) * size, num_rows)


def pieces_of(parameters: Mapping[str, Tensor]) -> Pieces:
    """Return FSDP2's pieces of the parameters, the same on every rank; if there are replicas, the first one writes."""
    writers, rows = [0], {}
    for name, param in parameters.items():
        dim = shard_dim(param) if isinstance(param, DTensor) else None
        rows[name] = max(1, param.shape[0])
        if isinstance(param, DTensor) and dim is not None:
            mesh = param.device_mesh.mesh
            ranks = mesh[tuple(slice(None) if axis == dim else 0 for axis in range(mesh.ndim))].tolist()
            assert writers in ([0], ranks), f"{name} is sharded over other ranks: {ranks}"
            writers = ranks
            rows[name] = max(1, -(-param.shape[0] // len(writers)))
    return Pieces(writers, rows)


def local_rows(param: Tensor) -> tuple[int, int]:
    """Return (start, stop), the rows of the full parameter that are on this rank."""
    per_row = param.numel() // param.shape[0] if param.shape[0] else 1
    start = shard_offset(param) // max(1, per_row)
    return start, start + local_tensor(param.detach()).shape[0]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return each parameter once, by its transformers name."""
    return {plain_name(name): param for name, param in model.named_parameters()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to a model's weights, by their transformers names: those that files store.

    Training does not change them: an example is the bias with which a router balances its experts.
    """
    return {
        plain_name(f"{path}.{name}").removeprefix("."): buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def optimizer_state(
    optimizer: Any, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return ({state: {name: tensor of the parameter's shape}}, {state: {name: number}}) of an optimizer.

    Raises:
        RunStopped: The optimizer has a state with another shape than its parameter.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, dict[str, float]] = {}
    states = state_holder(optimizer).state
    for name, param in parameters.items():
        for key, value in states.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                tensors.setdefault(key, {})[name] = value
            elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
                scalars.setdefault(key, {})[name] = float(value)
            else:
                raise RunStopped(
                    f"The optimizer keeps {key} of {name} in another shape than the parameter, which checkpoints cannot "
                    "store: choose another trainer.optim, such as adamw_torch_fused."
                )
    return tensors, scalars


def optimizer_figures(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe the optimizer for state.json: the dtype of each state that has its parameter's shape, and the rates."""
    tensors, _ = optimizer_state(optimizer, parameters)
    dtypes = {key: {name: str(t.dtype).removeprefix("torch.") for name, t in of.items()} for key, of in tensors.items()}
    groups = state_holder(optimizer).param_groups
    rates = [{name: float(group[name]) for name in ("lr", "initial_lr") if name in group} for group in groups]
    return {"states": dtypes, "groups": rates}


def rank_tensors(
    model: nn.Module, optimizer: Any, shards: list[ParameterShard], rng: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Tensor], Pieces, dict[str, Any]]:
    """Return this rank's tensors for its file, the rows in each rank's file, and the optimizer's scalars.

    Args:
        model: The model, sharded or not.
        optimizer: Its optimizer.
        shards: This rank's shards of the pruned parameters, whose masks are saved.
        rng: The states of this rank's random generators.
        rank: This rank.
    """
    parameters = parameters_of(model)
    pieces = pieces_of(parameters)
    moments, scalars = optimizer_state(optimizer, parameters)
    found = {name: pieces.of(name, rank, param.shape[0]) for name, param in parameters.items()}
    written = {name: rows for name, rows in found.items() if rows is not None}
    for name, rows in written.items():
        assert rows == local_rows(parameters[name]), f"{name} is not sharded the way FSDP2 shards: {rows}"
    tensors = {f"model/{name}": local_tensor(parameters[name].detach()) for name in written}
    for key, by_name in moments.items():
        tensors |= {f"optim.{key}/{name}": local_tensor(value) for name, value in by_name.items() if name in written}
    if rank == 0:
        tensors |= {f"buffer/{name}": buffer for name, buffer in buffers_of(model).items()}
    tensors |= {f"mask/{shard.name}": pack_mask(shard.mask) for shard in shards if shard.name in written}
    tensors |= {f"rng/{name}": value for name, value in rng.items()}
    return tensors, pieces, scalars
