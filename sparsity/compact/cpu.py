"""The product of a sparse matrix and a vector on a CPU, compiled by numba.

Importing this needs numba (`pip install .[cpu]`). The matrix is a `Packed` (`sparsity.compact.packed`) with bases. Each of
the eight slots has its own sum, so that no addition waits for the previous one. Indices are unsigned, because numba checks
signed ones for negative values.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from sparsity.compact.packed import Packed

LEAST_WEIGHTS = 1 << 16
"""The fewest kept weights that are worth a thread."""


def can_multiply(packed: Packed) -> bool:
    """Return whether `spmv` accepts the matrix: it has bases, and its values are bfloat16, float32 or int8."""
    return packed.bases.numel() > 0 and packed.values.dtype in _READ


def spmv(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T + bias` for the few vectors x [batch, columns], summed in float32, always in the same order.

    Args:
        packed: W on the CPU; `can_multiply` must hold for it.
        x: Vectors in any floating-point type, which the result has too.
        bias: One number for each row of W.
    """
    y = torch.empty(len(x), packed.rows)
    multiply, values = (
        _product(packed.values.dtype),
        packed.values.view(_VIEW.get(packed.values.dtype, packed.values.dtype)),
    )
    matrix = (
        values.numpy(),
        packed.offsets.numpy(),
        packed.bases.numpy(),
        np.uint64(packed.shift),
        packed.starts.numpy(),
    )
    edges = _edges(packed)
    for vector, row in zip(x.float().contiguous(), y, strict=True):
        calls = [(*matrix, vector.numpy(), row.numpy(), first, last) for first, last in pairwise(edges)]
        if len(calls) == 1:
            multiply(*calls[0])
        else:
            list(_threads(len(calls)).map(lambda call: multiply(*call), calls))
    if packed.scales is not None:
        y *= packed.scales
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    """Reinterpret the bits of an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always")
def _read_halves(values, word, slot):  # type: ignore[no-untyped-def]
    """Read a bfloat16 from a pair in an int32: the first is the low half, the second the high half."""
    pair = values[word, slot // 2]
    return _as_float(pair & np.int32(-65536)) if slot % 2 else _as_float(pair << np.int32(16))


@njit(inline="always")
def _read_number(values, word, slot):  # type: ignore[no-untyped-def]
    return np.float32(values[word, slot])


_READ: dict[torch.dtype, Callable[..., Any]] = {
    torch.bfloat16: _read_halves, torch.float32: _read_number, torch.int8: _read_number,
}  # fmt: skip
_VIEW = {torch.bfloat16: torch.int32}


@cache
def _product(dtype: torch.dtype) -> Callable[..., None]:
    """Compile the product for values of one type, which takes a second or two the first time."""
    read = _READ[dtype]

    @njit(nogil=True)
    def multiply(values, offsets, bases, shift, starts, x, y, first, last):  # type: ignore[no-untyped-def]
        num_chunks = bases.shape[1]
        for row in range(first, last):
            start = starts[row]
            lanes = (starts[row + 1] - start) // num_chunks
            a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = np.float32(0)
            for chunk in range(num_chunks):
                base = bases[row, chunk]
                b0, b1 = np.uint64(base[0]) << shift, np.uint64(base[1]) << shift
                b2, b3 = np.uint64(base[2]) << shift, np.uint64(base[3]) << shift
                b4, b5 = np.uint64(base[4]) << shift, np.uint64(base[5]) << shift
                b6, b7 = np.uint64(base[6]) << shift, np.uint64(base[7]) << shift
                begin = start + chunk * lanes
                for lane in range(lanes):
                    word = np.uint64(begin + lane)
                    a0 += read(values, word, 0) * x[b0 + np.uint64(offsets[word, 0])]
                    a1 += read(values, word, 1) * x[b1 + np.uint64(offsets[word, 1])]
                    a2 += read(values, word, 2) * x[b2 + np.uint64(offsets[word, 2])]
                    a3 += read(values, word, 3) * x[b3 + np.uint64(offsets[word, 3])]
                    a4 += read(values, word, 4) * x[b4 + np.uint64(offsets[word, 4])]
                    a5 += read(values, word, 5) * x[b5 + np.uint64(offsets[word, 5])]
                    a6 += read(values, word, 6) * x[b6 + np.uint64(offsets[word, 6])]
                    a7 += read(values, word, 7) * x[b7 + np.uint64(offsets[word, 7])]
            y[row] = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))

    return multiply


def _edges(packed: Packed) -> list[int]:
    """Return the first row of each thread's part, and the number of rows at the end."""
    parts = max(1, min(torch.get_num_threads(), packed.rows, packed.values.numel() // LEAST_WEIGHTS))
    return [packed.rows * part // parts for part in range(parts + 1)]


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="sparse-product")
