"""A linear layer that stays sparse in memory, for inference, and the replacement of a model's layers by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.compact.packed import Packed, coded, pack, unpack
from sparsity.compact.product import Tiles, multiply
from sparsity.devices import kernels_for

MOST_DENSITY, MOST_DENSITY_EARLY, MOST_DENSITY_ON_CPU = 0.35, 0.5, 0.25
"""Denser layers are not replaced; see `most_density_for`."""
_ALIGNMENT = 256


class SparseLinear(nn.Module):
    """An `nn.Linear` that holds only its kept weights, plus one byte for the column of each.

    A few rows of input are multiplied directly by the kept weights: up to `product.MOST_VECTORS` on a GPU, and
    `product.MOST_VECTORS_ON_CPU` on a CPU with numba. For more rows, the matrix is unpacked a tile at a time. The layer has no
    parameters and cannot be trained, but gradients reach its input.
    """

    values: Tensor
    offsets: Tensor
    bases: Tensor
    starts: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, packed.rows
        self.num_chunks, self.shift = packed.num_chunks, packed.shift
        for name in ("values", "offsets", "bases", "starts", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.tiles = Tiles.of(packed)
        self.coded_dtype = None if packed.scales is None else dtype or torch.float32
        """The type of the weight that int8 codes stand for; None if the values are no codes."""

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> SparseLinear:
        """Return the layer of a dense matrix.

        Args:
            weight: The matrix [out, in].
            bias: The layer's bias.
            scales: The scale of each row, if the weight was restored from int8 codes; the layer then holds these codes.

        Raises:
            ValueError: The weight is not a matrix.
        """
        packed = pack(weight)
        with_codes = None if scales is None else coded(packed, scales)
        return cls(with_codes or packed, bias, weight.dtype)

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
        dense = unpack(self.packed, words=(self.tiles.words[0], self.tiles.words[-1]))
        return dense if self.coded_dtype is None else dense.to(self.coded_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.packed, self.bias, self.tiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Keep scales in float32 if the module's type changes; the weight has the new type."""
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None:
            self.coded_dtype = fn(torch.empty(0, dtype=self.coded_dtype, device=scales.device)).dtype
            if self.scales.dtype != scales.dtype:
                self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def most_density_for(device: torch.device) -> float:
    """Return the largest density at which measurements favour the sparse product.

    On an H100, where kernels start early, the sparse product is 1.3 and 1.4 times as fast as a dense one at 0.5. An H200
    without early starts took 0.6 to 0.8 of cuBLAS's time at 0.3 and up to 1.3 at 0.5. On a CPU the sparse product is 1.06 to
    1.2 times as fast as a dense one at 0.25, and 0.9 to 1.0 times at 0.3.
    """
    if device.type == "cpu":
        return MOST_DENSITY_ON_CPU
    if device.type != "cuda" or kernels_for(device) is None:
        return MOST_DENSITY
    from sparsity.compact.spmv import can_start_early

    return MOST_DENSITY_EARLY if can_start_early(device) else MOST_DENSITY


def sparse_linears_(model: nn.Module, most_density: float | None = None, group: bool = True) -> list[str]:
    """Replace each sparse linear layer by a `SparseLinear`, one at a time; return the layers' names.

    Layers that share their weight with another module, subclasses of nn.Linear, and layers denser than `most_density` are
    not replaced.

    Args:
        model: A module with its weights.
        most_density: The largest share of kept weights at which a layer is replaced; None: `most_density_for` its device.
        group: Whether projections of the same input become one matrix (`sparsity.compact.groups`).

    Raises:
        ValueError: The model itself is a linear layer.
    """
    from sparsity.compact.groups import group_linears_

    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                owners[id(param)] = owners.get(id(param), 0) + 1
    replaced = []
    for name, module in list(model.named_modules()):
        scales = module.__dict__.pop(ROW_SCALES, None)
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1 or module.weight.device.type == "meta":
            continue
        most = most_density_for(module.weight.device) if most_density is None else most_density
        if torch.count_nonzero(module.weight).item() > most * module.weight.numel():
            continue
        if not name:
            raise ValueError(
                "the model is itself a linear layer: use SparseLinear.from_dense(layer.weight, layer.bias)"
            )
        replace_(model, name, SparseLinear.from_dense(module.weight, module.bias, scales))
        replaced.append(name)
    if group:
        group_linears_(model)
    share_storage_([layer for layer in model.modules() if isinstance(layer, SparseLinear) and layer.values.is_cuda])
    return replaced


ROW_SCALES = "_compact_row_scales"
"""The attribute in which loading leaves a rounded layer's scales for `sparse_linears_`."""


def replace_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule `name`, with its hook of accelerate and its mode."""
    module: Any = model.get_submodule(name)
    layer.train(module.training)
    if hasattr(module, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, module._hf_hook)
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)


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
