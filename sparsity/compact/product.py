"""The product with a packed matrix: by kernels for a few vectors, a tile at a time for many, and as an operator of torch.

The operator `torch.ops.sparsity.linear` is what torch.compile and torch.export see: one call whose result has a known shape, so
that no graph breaks and a CUDA graph can capture it. Its gradient reaches x only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from sparsity.compact.packed import Packed, unpack
from sparsity.devices import kernels_for

MOST_VECTORS = 8
"""The most vectors that the kernel takes at once; for more, the matrix is unpacked a tile at a time."""
MOST_VECTORS_ON_CPU = 32
"""The same on a CPU, where each vector reads the matrix once, in about a hundredth of the time to unpack it."""
TILE = 1 << 22
"""The number of weights that are unpacked at a time."""


@dataclass(frozen=True)
class Tiles:
    """The edges of a matrix's tiles, read from the device once, so that no product waits for it."""

    rows: tuple[int, ...]
    words: tuple[int, ...]

    @classmethod
    def of(cls, packed: Packed) -> Tiles:
        """Cut the rows of `packed` into tiles of about `TILE` weights; the host reads the edges from the device."""
        step = max(1, TILE // max(1, packed.columns))
        rows = (*range(0, packed.rows, step), packed.rows)
        return cls(rows, tuple(packed.starts[list(rows)].tolist()))


def multiply(x: Tensor, packed: Packed, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Return `x @ W.T + bias`.

    Args:
        x: Vectors [..., columns] on W's device.
        packed: W.
        bias: One number for each row of W.
        tiles: The tiles of `packed`.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        # As in nn.Linear; the kernels themselves do not see autocast, and a cache needs results of one type.
        x = x.to(torch.get_autocast_dtype(kind))
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        found: Tensor = _linear(x, *_arguments(packed, bias, tiles))
        return found
    return _product(x, packed, bias, tiles)


def most_vectors(x: Tensor) -> int:
    """Return how many vectors on the device of `x` kernels multiply at once."""
    return MOST_VECTORS if x.is_cuda else MOST_VECTORS_ON_CPU


def _product(x: Tensor, packed: Packed, bias: Tensor | None, tiles: Tiles) -> Tensor:
    vectors = x.reshape(-1, packed.columns)
    kernel = _kernel(packed) if len(vectors) <= most_vectors(x) else None
    if kernel is not None:
        found: Tensor = kernel.spmv(packed, vectors, bias)
        return found.view(*x.shape[:-1], packed.rows)
    bias = None if bias is None else bias.to(x.dtype)
    if len(tiles.rows) == 2:
        found = F.linear(vectors, next(_dense_tiles(packed, tiles)).to(x.dtype), bias)
    else:
        found = torch.cat([F.linear(vectors, tile.to(x.dtype)) for tile in _dense_tiles(packed, tiles)], -1)
        found = found if bias is None else found + bias
    return found.view(*x.shape[:-1], packed.rows)


def _dense_tiles(packed: Packed, tiles: Tiles) -> Any:
    return (
        unpack(packed, *rows, words) for rows, words in zip(pairwise(tiles.rows), pairwise(tiles.words), strict=True)
    )


# --- the operator ---

_MATRIX = (
    "Tensor values, Tensor offsets, Tensor bases, Tensor starts, Tensor? scales, Tensor? bias, int columns, int num_chunks, "
    "int shift, int[] tile_rows, int[] tile_words"
)


@library.custom_op("sparsity::linear", mutates_args=(), schema=f"(Tensor x, {_MATRIX}) -> Tensor")
def _linear(x: Tensor, *matrix: Any) -> Tensor:
    return _product(x, *_from_arguments(*matrix))


@_linear.register_fake
def _(x: Tensor, *matrix: Any) -> Tensor:
    packed, _, _ = _from_arguments(*matrix)
    return x.new_empty(*x.shape[:-1], packed.rows)


@library.custom_op("sparsity::linear_backward", mutates_args=(), schema=f"(Tensor grad, {_MATRIX}) -> Tensor")
def _linear_backward(grad: Tensor, *matrix: Any) -> Tensor:
    packed, _, tiles = _from_arguments(*matrix)
    found = grad.new_zeros(*grad.shape[:-1], packed.columns)
    for (first, last), tile in zip(pairwise(tiles.rows), _dense_tiles(packed, tiles), strict=True):
        found += grad[..., first:last] @ tile.to(grad.dtype)
    return found


@_linear_backward.register_fake
def _(grad: Tensor, *matrix: Any) -> Tensor:
    packed, _, _ = _from_arguments(*matrix)
    return grad.new_empty(*grad.shape[:-1], packed.columns)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tensors = [part for part in inputs[1:] if isinstance(part, Tensor) or part is None]
    ctx.numbers = inputs[1 + len(ctx.tensors) :]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _linear_backward(grad, *ctx.tensors, *ctx.numbers)
    return (found, *[None] * (len(ctx.tensors) + len(ctx.numbers)))


_linear.register_autograd(_backward, setup_context=_set_up)


def _arguments(packed: Packed, bias: Tensor | None, tiles: Tiles) -> tuple[Any, ...]:
    """Return a matrix as the operator's arguments."""
    tensors = packed.values, packed.offsets, packed.bases, packed.starts, packed.scales, bias
    return (*tensors, packed.columns, packed.num_chunks, packed.shift, list(tiles.rows), list(tiles.words))


def _from_arguments(
    values: Tensor, offsets: Tensor, bases: Tensor, starts: Tensor, scales: Tensor | None, bias: Tensor | None,
    columns: int, num_chunks: int, shift: int, tile_rows: Sequence[int], tile_words: Sequence[int],
) -> tuple[Packed, Tensor | None, Tiles]:  # fmt: skip
    packed = Packed(values, offsets, bases, starts, columns, num_chunks, shift, scales)
    return packed, bias, Tiles(tuple(tile_rows), tuple(tile_words))


# --- kernels ---


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
