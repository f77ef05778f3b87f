"""A linear layer that stays sparse in memory, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.compact.packed import Packed, pack, unpack
from sparsity.devices import kernels_for

MOST_VECTORS = 8
"""The kernel takes so many at once; for more a tile is unpacked at a time."""
TILE = 1 << 22
"""Weights that are dense at a time."""
MOST_DENSITY = 0.35
"""Denser layers stay as they are. On an H200 the kernel takes 0.6 to 0.8 of cuBLAS's time at 0.3 and up to 1.3 at 0.5."""
_ALIGNMENT = 256


class SparseLinear(nn.Module):
    """`nn.Linear` with the bytes of its kept weights and one byte more for each: the columns.

    Up to `MOST_VECTORS` rows of input on a GPU go through one kernel that reads only these; for others, and on a CPU,
    rows of the matrix are made dense a tile at a time. It has no parameters and is not trained; gradients reach its input.
    """

    values: Tensor
    offsets: Tensor
    bases: Tensor
    starts: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, packed.rows
        self.num_chunks, self.shift = packed.num_chunks, packed.shift
        for name in ("values", "offsets", "bases", "starts", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> SparseLinear:
        """Pack `weight` [out, in]; a ValueError if it is no matrix."""
        return cls(pack(weight), bias)

    @property
    def packed(self) -> Packed:
        return Packed(
            self.values, self.offsets, self.bases, self.starts, self.in_features, self.num_chunks, self.shift, self.scales
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """The dense matrix, made anew: models look at a weight's type and device."""
        return self.dense()

    def dense(self) -> Tensor:
        """Return the matrix that was packed, bit for bit."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        num_vectors = x.numel() // max(1, self.in_features)
        is_differentiated = torch.is_grad_enabled() and x.requires_grad
        kernel = _kernel(x.device) if x.is_cuda and num_vectors <= MOST_VECTORS and not is_differentiated else None
        if kernel is not None:
            found = kernel.spmv(self.packed, x.reshape(-1, self.in_features), self.bias)
            return found.view(*x.shape[:-1], self.out_features)
        rows = max(1, TILE // max(1, self.in_features))
        if self.out_features <= rows:
            return F.linear(x, self.dense().to(x.dtype), self.bias)
        tiles = [
            F.linear(x, unpack(self.packed, first, min(first + rows, self.out_features)).to(x.dtype))
            for first in range(0, self.out_features, rows)
        ]
        found = torch.cat(tiles, -1)
        return found if self.bias is None else found + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _kernel(device: torch.device) -> ModuleType | None:
    """The kernel's module; None if Triton is not installed or cannot run."""
    if kernels_for(device) is None:
        return None
    from sparsity.compact import spmv

    return spmv


def sparse_linears_(model: nn.Module, most_density: float = MOST_DENSITY) -> list[str]:
    """Put a `SparseLinear` in place of each sparse linear layer, one at a time; return their names.

    Layers that share their weight with an embedding, subclasses of nn.Linear, and layers denser than `most_density` stay.

    Args:
        model: A module with its weights.
        most_density: The largest share of kept weights of a layer that is replaced.
    """
    owners: dict[int, int] = {}
    layers: list[SparseLinear] = []
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                owners[id(param)] = owners.get(id(param), 0) + 1
    replaced = []
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1 or module.weight.device.type == "meta":
            continue
        if torch.count_nonzero(module.weight).item() > most_density * module.weight.numel():
            continue
        if not name:
            raise ValueError(
                "the model is itself a linear layer: use SparseLinear.from_dense(layer.weight, layer.bias)"
            )
        layer = SparseLinear.from_dense(module.weight, module.bias).train(module.training)
        if hasattr(module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(layer, module._hf_hook)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer)
        replaced.append(name)
        layers.append(layer)
    share_storage_([layer for layer in layers if layer.values.is_cuda])
    return replaced


def share_storage_(layers: Sequence[SparseLinear]) -> None:
    """Put the buffers of all layers, which are on one device each, into one storage a device.

    An allocator rounds each tensor up: on a GPU by half a megabyte, some 13 MB for a 1B.
    """
    by_device: dict[torch.device, list[tuple[SparseLinear, str, Tensor]]] = {}
    for layer in layers:
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.numel():
                by_device.setdefault(buffer.device, []).append((layer, name, buffer))
    for device, buffers in by_device.items():
        sizes = [-(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT for _, _, buffer in buffers]
        storage = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for part, (layer, name, buffer) in zip(storage.split(sizes), buffers, strict=True):
            found = part[: buffer.nbytes].view(buffer.dtype).view(buffer.shape)
            layer._buffers[name] = found.copy_(buffer)
