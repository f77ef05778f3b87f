"""The product of a sparse matrix and a vector on a CPU, compiled by numba.

Importing this needs numba (`pip install .[cpu]`). The matrix is a `Packed` (`sparsity.compact.packed`) with bases. The eight
values of a word are converted and multiplied as one vector of eight numbers, which LLVM maps to the CPU's registers. Their
elements of x are loaded one by one: eight scalar loads take less time than AVX2's gather.
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
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from sparsity.compact.packed import SLOTS, Packed

LEAST_WEIGHTS = 1 << 16
"""The fewest kept weights that are worth a thread."""
_BYTE, _SHORT, _INT, _LONG, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VALUES: dict[torch.dtype, ir.Type] = {torch.bfloat16: _SHORT, torch.float32: _FLOAT, torch.int8: _BYTE}
_BASES: dict[torch.dtype, ir.Type] = {torch.uint8: _BYTE, torch.int16: _SHORT, torch.int32: _INT}


def can_multiply(packed: Packed) -> bool:
    """Return whether `spmv` accepts the matrix: it has bases, and its values are bfloat16, float32 or int8."""
    return packed.bases.numel() > 0 and packed.values.dtype in _VALUES


def spmv(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T + bias` for the few vectors x [batch, columns], summed in float32, always in the same order.

    Args:
        packed: W on the CPU; `can_multiply` must hold for it.
        x: Vectors in any floating-point type, which the result has too.
        bias: One number for each row of W.
    """
    y = torch.empty(len(x), packed.rows, dtype=torch.float32, device=x.device)
    multiply = _product(packed.values.dtype, packed.bases.dtype)
    matrix = (packed.values.data_ptr(), packed.offsets.data_ptr(), packed.bases.data_ptr(), packed.shift)
    numbers, starts, edges = x.float().contiguous(), packed.starts.numpy(), _edges(packed)
    for vector, row in zip(numbers, y, strict=True):
        calls = [
            (*matrix, packed.num_chunks, starts, vector.data_ptr(), row.numpy(), first, last)
            for first, last in pairwise(edges)
        ]
        if len(calls) == 1:
            multiply(*calls[0])
        else:
            list(_threads(len(calls)).map(lambda call: multiply(*call), calls))
    if packed.scales is not None:
        y *= packed.scales
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@cache
def _product(values_dtype: torch.dtype, bases_dtype: torch.dtype) -> Callable[..., None]:
    """Compile the product for one type of values and one of bases, which takes a second or two the first time."""
    multiply_row = _row_product(values_dtype, bases_dtype)
    bytes_of_group = SLOTS * bases_dtype.itemsize

    @njit(nogil=True)
    def multiply(values, offsets, bases, shift, num_chunks, starts, x, y, first, last):  # type: ignore[no-untyped-def]
        for row in range(first, last):
            start = np.int64(starts[row])
            lanes = (np.int64(starts[row + 1]) - start) // num_chunks
            of_row = bases + row * num_chunks * bytes_of_group
            y[row] = multiply_row(values, offsets, of_row, shift, num_chunks, start, lanes, x)

    return multiply


def _row_product(values_dtype: torch.dtype, bases_dtype: torch.dtype) -> Callable[..., Any]:
    """Return a function for numba that multiplies one row; matrix and vector are addresses."""

    @intrinsic
    def multiply_row(
        context: Any, values: Any, offsets: Any, bases: Any, shift: Any, num_chunks: Any, start: Any, lanes: Any, x: Any
    ) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            values, offsets, bases, shift, num_chunks, start, lanes, x = arguments
            total = cgutils.alloca_once_value(builder, ir.Constant(_eight(_FLOAT), [0.0] * SLOTS))
            with cgutils.for_range(builder, num_chunks) as chunks:
                base = _load_eight(builder, bases, chunks.index, _BASES[bases_dtype])
                elements = [_element(builder, x, builder.extract_element(base, _INT(k)), shift) for k in range(SLOTS)]
                first = builder.add(start, builder.mul(chunks.index, lanes))
                with cgutils.for_range(builder, lanes) as words:
                    place = builder.add(first, words.index)
                    value = _numbers(builder, _load_eight(builder, values, place, _VALUES[values_dtype]))
                    found = _elements(
                        builder, elements, _pointer(builder, offsets, builder.mul(place, _LONG(SLOTS)), _BYTE)
                    )
                    # "contract" allows one instruction for the product and the sum.
                    both = builder.fmul(value, found, flags=["contract"])
                    builder.store(builder.fadd(builder.load(total), both, flags=["contract"]), total)
            return _sum(builder, builder.load(total))

        return types.float32(*[types.int64] * 8), generate

    return multiply_row


def _eight(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, SLOTS)


def _pointer(builder: ir.IRBuilder, address: ir.Value, place: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [place])


def _load_eight(builder: ir.IRBuilder, address: ir.Value, place: ir.Value, kind: ir.Type) -> ir.Value:
    """Load the vector number `place` of a list that need not be aligned."""
    found = builder.load(_pointer(builder, address, place, _eight(kind)))
    found.align = 1
    return found


def _numbers(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Convert eight values to float32: int8, float32, or bfloat16 as the upper half of a float32's bits."""
    kind = values.type.element
    if kind == _SHORT:
        wide = builder.zext(values, _eight(_INT))
        return builder.bitcast(builder.shl(wide, ir.Constant(_eight(_INT), [16] * SLOTS)), _eight(_FLOAT))
    return builder.sitofp(values, _eight(_FLOAT)) if kind == _BYTE else values


def _element(builder: ir.IRBuilder, x: ir.Value, base: ir.Value, shift: ir.Value) -> ir.Value:
    """Return a pointer to x at a group's base."""
    return _pointer(builder, x, builder.shl(builder.zext(base, _LONG), shift), _FLOAT)


def _elements(builder: ir.IRBuilder, bases: list[ir.Value], offsets: ir.Value) -> ir.Value:
    """Load an element of x for each slot: at its base, plus its byte of the eight at `offsets`."""
    found = ir.Constant(_eight(_FLOAT), ir.Undefined)
    for slot, base in enumerate(bases):
        offset = builder.zext(builder.load(builder.gep(offsets, [_LONG(slot)])), _LONG)
        found = builder.insert_element(found, builder.load(builder.gep(base, [offset])), _INT(slot))
    return found


def _sum(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Add the eight sums in pairs, then the pairs."""
    sums = [builder.extract_element(vector, _INT(slot)) for slot in range(SLOTS)]
    while len(sums) > 1:
        sums = [builder.fadd(first, second) for first, second in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _edges(packed: Packed) -> list[int]:
    """Return the first row of each thread's part, and the number of rows at the end."""
    parts = max(1, min(torch.get_num_threads(), packed.rows, packed.values.numel() // LEAST_WEIGHTS))
    return [packed.rows * part // parts for part in range(parts + 1)]


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="sparse-product")
