"""A linear layer that stays sparse in memory, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.compact.packed import Packed, coded, pack, unpack
from sparsity.compact.product import Tiles, multiply


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
        """The kept weights in the layout that the kernels read."""
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
        """Return x W^T + bias, computed from the kept weights."""
        return multiply(x, self.packed, self.bias, self.tiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Convert or move the layer. Keep scales in float32 if its type changes; the weight has the new type."""
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None:
            self.coded_dtype = fn(torch.empty(0, dtype=self.coded_dtype, device=scales.device)).dtype
            if self.scales.dtype != scales.dtype:
                self.scales = scales.to(self.scales.device)
        wait_until_written(self.values)
        return self

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def wait_until_written(weights: Tensor) -> None:
    """Wait until a GPU has written `weights`, because a product may read them before the kernel launched before it ends."""
    if weights.is_cuda:
        torch.cuda.synchronize(weights.device)


def replace_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule `name`, with its hook of accelerate and its mode."""
    module: Any = model.get_submodule(name)
    layer.train(module.training)
    if hasattr(module, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, module._hf_hook)
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
