"""A linear layer that stays sparse in memory, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.compact.packed import Packed, pack, unpack
from sparsity.devices import kernels_for

MOST_VECTORS = 8
"""The most vectors that the kernel multiplies at once; for more, the matrix is unpacked a tile at a time."""
MOST_VECTORS_ON_CPU = 32
"""The same limit on a CPU. There each vector reads the whole matrix, in about a hundredth of the time to unpack it."""
TILE = 1 << 22
"""The number of weights that are unpacked at a time."""
MOST_DENSITY, MOST_DENSITY_EARLY = 0.35, 0.5
"""Denser layers are not replaced; see `most_density_for`."""
_ALIGNMENT = 256


class SparseLinear(nn.Module):
    """An `nn.Linear` that holds only its kept weights, plus one byte for the column of each.

    Up to `MOST_VECTORS` rows of input on a GPU, and `MOST_VECTORS_ON_CPU` on a CPU with numba, are multiplied directly by the
    kept weights. For more rows, the matrix is unpacked a tile at a time. The layer has no parameters and cannot be trained,
    but gradients reach its input.
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
        """Return the layer of a dense `weight` [out, in]; raise a ValueError if it is not a matrix."""
        return cls(pack(weight), bias)

    @property
    def packed(self) -> Packed:
        return Packed(
            self.values, self.offsets, self.bases, self.starts, self.in_features, self.num_chunks, self.shift, self.scales
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """The dense matrix, unpacked at each access, for models that ask a weight for its type and device."""
        return self.dense()

    def dense(self) -> Tensor:
        """Return the matrix that was packed, bit for bit."""
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        num_vectors = x.numel() // max(1, self.in_features)
        is_differentiated = torch.is_grad_enabled() and x.requires_grad
        most = MOST_VECTORS if x.is_cuda else MOST_VECTORS_ON_CPU
        kernel = _kernel(self.packed) if num_vectors <= most and not is_differentiated else None
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


def _kernel(packed: Packed) -> ModuleType | None:
    """Return the module that can multiply by `packed`; None without Triton, or on a CPU without numba."""
    device = packed.values.device
    if device.type == "cpu":
        cpu = _cpu_kernel()
        return cpu if cpu is not None and cpu.can_multiply(packed) else None
    if kernels_for(device) is None:
        return None
    from sparsity.compact import spmv

    return spmv


@cache
def _cpu_kernel() -> ModuleType | None:
    try:
        from sparsity.compact import cpu
    except ImportError:
        return None
    return cpu


def most_density_for(device: torch.device) -> float:
    """Return the largest density at which measurements favour the sparse product.

    On an H100, where kernels start early, the sparse product is 1.3 and 1.4 times as fast as a dense one at 0.5. An H200
    without early starts took 0.6 to 0.8 of cuBLAS's time at 0.3 and up to 1.3 at 0.5. On a CPU the sparse product is as fast
    as a dense one at 0.2.
    """
    if device.type != "cuda" or kernels_for(device) is None:
        return MOST_DENSITY
    from sparsity.compact.spmv import can_start_early

    return MOST_DENSITY_EARLY if can_start_early(device) else MOST_DENSITY


def sparse_linears_(model: nn.Module, most_density: float | None = None) -> list[str]:
    """Replace each sparse linear layer by a `SparseLinear`, one at a time; return the layers' names.

    Layers that share their weight with another module, subclasses of nn.Linear, and layers denser than `most_density` are
    not replaced.

    Args:
        model: A module with its weights.
        most_density: The largest share of kept weights at which a layer is replaced; None: `most_density_for` its device.

    Raises:
        ValueError: The model itself is a linear layer.
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
        most = most_density_for(module.weight.device) if most_density is None else most_density
        if torch.count_nonzero(module.weight).item() > most * module.weight.numel():
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
    """Move the buffers of all layers into one storage for each device.

    An allocator rounds up the size of each tensor: on a GPU by half a megabyte, which adds up to 13 MB for a 1B model.
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
