"""A parameter as one rank sees it: its local shard, the shard's position in the full tensor, and which ranks hold the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard


@dataclass
class ParameterShard:
    """The local part of one prunable parameter, its mask and its position in the full tensor.

    `values` [local numel] is a flat view of the parameter, so writing to it changes the weight. `mask` [local numel] is True
    for kept weights. Both cover the flat indices offset .. offset + local numel of the full tensor, which has `full_numel`
    elements in the shape `shape`. `gradient` [local numel] and `state`, {name: [local numel]}, are set only during an event
    whose score needs them, and so is `input_norms`.
    """

    name: str
    values: Tensor
    mask: Tensor
    offset: int
    full_numel: int
    shape: tuple[int, ...] = ()
    gradient: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    input_norms: Tensor | None = None
    """The norm of each input of the layer over calibration text, float32 [inputs], whatever part of the weight this is."""
    stride: int = 1
    """Distance in the full tensor from one of `values` to the next: 1 except in samples."""

    def index(self, part: slice) -> Tensor:
        """Return the flat indices, int64, of a slice of the local weights in the full tensor."""
        places = torch.arange(part.start, part.stop, device=self.values.device)
        return self.offset + (places if self.stride == 1 else places * self.stride)

    def every(self, start: int, stride: int) -> ParameterShard:
        """Return a shard of every `stride`-th local weight, beginning at `start`."""
        return replace(
            self,
            values=self.values[start::stride],
            mask=self.mask[start::stride],
            offset=self.offset + start,
            gradient=None if self.gradient is None else self.gradient[start::stride],
            state={name: values[start::stride] for name, values in self.state.items()},
            stride=stride,
        )


@dataclass(frozen=True)
class RankLayout:
    """The ranks that the parameters are sharded over (`shard_group`), and those that hold copies of the same shard.

    A shard group of None means this rank alone. Counts are summed over the shard group and never over replicas.
    """

    shard_group: dist.ProcessGroup | None = None
    replica_groups: tuple[dist.ProcessGroup, ...] = field(default=())

    @property
    def shard_rank(self) -> int:
        """This rank's number in the shard group."""
        return 0 if self.shard_group is None else dist.get_rank(self.shard_group)

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Sum int64 `counts` over the shard group, in place.

        Collective: over the shard group.
        """
        if self.shard_group is not None:
            dist.all_reduce(counts, group=self.shard_group)
        return counts

    def sum_ints(self, counts: Sequence[int], device: torch.device) -> list[int]:
        """Return each of `counts` summed over the shard group.

        Collective: over the shard group.
        """
        if self.shard_group is None:
            return list(counts)
        return [int(count) for count in self.sum_counts(to_device(counts, device)).tolist()]

    def gather_count(self, count: int, device: torch.device) -> list[int]:
        """Return each rank's `count`, in the order of the shard group.

        Collective: over the shard group.
        """
        if self.shard_group is None:
            return [count]
        counts = [0] * dist.get_world_size(self.shard_group)
        counts[self.shard_rank] = count
        return self.sum_ints(counts, device)


def to_device(counts: Sequence[int], device: torch.device) -> Tensor:
    """Copy numbers to a device as int64 without waiting: the driver has read pageable memory when the call returns."""
    return torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` on this rank; writing to it changes the parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_values(param: Tensor) -> Tensor:
    """Return a flat view [local numel] of a parameter's shard, outside autograd."""
    return local_tensor(param.detach()).view(-1)


def shard_offset(param: Tensor) -> int:
    """Return the flat index of the local shard's first element in the full tensor; a shard is consecutive whole rows."""
    if not isinstance(param, DTensor):
        return 0
    dim = shard_dim(param)
    if dim is None or param.shape[0] == 0:
        return 0
    world, rank = param.device_mesh.size(dim), param.device_mesh.get_local_rank(dim)
    rows = -(-param.shape[0] // world)
    return min(rank * rows, param.shape[0]) * (param.numel() // param.shape[0])


def rank_layout(params: Sequence[Tensor]) -> RankLayout:
    """Return the layout that all `params` share (plain, DDP, FSDP2 or HSDP); raise a ValueError if they differ."""
    layouts = {_layout_of(param) for param in params}
    if len(layouts) > 1:
        raise ValueError(
            f"The prunable parameters are laid out in {len(layouts)} different ways: one FSDP2 mesh must hold them all."
        )
    return layouts.pop() if layouts else RankLayout()


def _layout_of(param: Tensor) -> RankLayout:
    if not isinstance(param, DTensor):
        replicated = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return RankLayout(None, (dist.group.WORLD,) if replicated else ())  # type: ignore[arg-type]
    mesh, sharded = param.device_mesh, shard_dim(param)
    replicas = tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if dim != sharded and mesh.size(dim) > 1)
    return RankLayout(None if sharded is None else mesh.get_group(sharded), replicas)


def shard_dim(param: DTensor) -> int | None:
    """Return the mesh dimension that rows are sharded over; None if every rank holds the whole parameter.

    Raises:
        ValueError: The parameter is sharded in another way than by rows over one mesh dimension.
    """
    sharded = [dim for dim, placement in enumerate(param.placements) if isinstance(placement, Shard)]
    whole_rows = all(param.placements[dim] == Shard(0) for dim in sharded)
    if len(sharded) > 1 or not whole_rows or any(isinstance(p, Partial) for p in param.placements):
        raise ValueError(
            f"A parameter of shape {tuple(param.shape)} is placed as {param.placements}: pruning needs plain FSDP2 or HSDP "
            "shards of rows, Shard(0) along one mesh dimension; turn tensor parallelism off."
        )
    return sharded[0] if sharded else None


def chunks(size: int, device: torch.device, on_cpu: int = 1 << 16) -> Iterator[slice]:
    """Yield slices that cover `size` elements: small enough for a CPU's cache, or large enough to keep a GPU busy."""
    step = on_cpu if device.type == "cpu" else 1 << 22
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
