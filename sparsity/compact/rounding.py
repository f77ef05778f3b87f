"""Rounding of kept values to 8 or 4 bits: symmetric codes, with a scale for each row or each group of kept values.

A restored value is its code times its scale, rounded once to the tensor's type. Codes are -127 to 127 or -7 to 7, and scales
have the tensor's type. A segment here means consecutive kept values that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsity.compact.bitmask import bitmask_bytes

BITS_OF_VALUES = {"int8": 8, "int4": 4}
GROUP_OF_INT4 = 64
_FRACTIONS = tuple(1 - step / 24 for step in range(13))
"""The shares of the largest magnitude that are tried as a scale's range: clipping a few values gives the others finer steps."""
_AT_A_TIME = 1 << 20
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_COUNTS = torch.tensor([byte.bit_count() for byte in range(256)])


@dataclass(frozen=True)
class Rounding:
    """The rule by which kept values are rounded.

    Args:
        bits: 8 or 4.
        group: The number of kept values that share a scale, a multiple of 16; 0 for one scale for each row.
        rule: "mse" takes the scale with the least squared error, "absmax" the largest magnitude divided by the largest code.

    Raises:
        ValueError: The group is not a multiple of 16.
    """

    bits: int
    group: int = 0
    rule: Literal["absmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        if self.group < 0 or self.group % 16:
            raise ValueError(f"group={self.group} is not a multiple of 16: give 32 or 64, or 0 for one scale a row.")

    @property
    def most(self) -> int:
        """The largest code."""
        return int((1 << (self.bits - 1)) - 1)


def round_values(values: Tensor, sizes: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Return codes, int8 [n], and scales [segments] in the values' type.

    Args:
        values: Kept values [n] of a floating-point type.
        sizes: The number of values in each segment; the sum is n.
        rounding: The rule.

    Raises:
        ValueError: A value is not finite.
    """
    codes = torch.empty(values.numel(), dtype=torch.int8)
    scales = torch.empty(sizes.numel(), dtype=values.dtype)
    for first, last, start, stop in _pieces(sizes):
        found = values[start:stop].float()
        if not bool(found.isfinite().all()):
            raise ValueError("a value is infinite or NaN, which has no code")
        part = sizes[first:last]
        segment = torch.repeat_interleave(part)
        largest = torch.zeros_like(part, dtype=torch.float32).scatter_reduce_(0, segment, found.abs(), "amax")
        best = torch.full_like(largest, torch.inf)
        for fraction in _FRACTIONS if rounding.rule == "mse" else (1.0,):
            scale = (largest * (fraction / rounding.most)).to(values.dtype)
            code = _codes(found, scale.float()[segment], rounding.most)
            error = torch.zeros_like(largest).index_add_(0, segment, (code * scale.float()[segment] - found).square())
            is_better = error < best
            best = torch.where(is_better, error, best)
            scales[first:last] = torch.where(is_better, scale, scales[first:last])
            codes[start:stop] = torch.where(is_better[segment], code.to(torch.int8), codes[start:stop])
    return codes, scales


def restore_values(codes: Tensor, scales: Tensor, sizes: Tensor) -> Tensor:
    """Return the values [n] of `codes` in the scales' type, on any device; all readers of codes use this function."""
    wide = torch.promote_types(scales.dtype, torch.float32)
    return (codes.to(wide) * torch.repeat_interleave(scales.to(wide), sizes)).to(scales.dtype)


def stored_codes(codes: Tensor, rounding: Rounding) -> np.ndarray:
    """Return codes as they are stored in a file: int8, or two in a byte with the first in the low half.

    The shape is [bytes], or [groups, bytes of a group]. The end is padded with zeros, so that each list or group takes a
    multiple of 8 bytes.
    """
    unit = rounding.group or 64 // rounding.bits
    full = torch.zeros(-(-codes.numel() // unit) * unit, dtype=torch.int8)
    full[: codes.numel()] = codes
    if rounding.bits == 8:
        found = full.numpy()
    else:
        halves = full.numpy().view(np.uint8) & 15
        found = halves[::2] | halves[1::2] << 4
    return found.reshape(-1, rounding.group * rounding.bits // 8) if rounding.group else found


def read_codes(stored: Tensor, kept: int) -> Tensor:
    """Return the first `kept` codes, int8, from a result of `stored_codes`."""
    flat = stored.reshape(-1)
    if flat.dtype == torch.uint8:
        low, high = flat << 4, flat & 0xF0
        # The right shift of int8 is arithmetic, so it extends the sign.
        flat = torch.stack([low, high], 1).view(-1).view(torch.int8) >> 4
    return flat[:kept]


def group_of(stored: Tensor) -> int:
    """Return how many values share a scale, from the shape of the stored codes; 0 for one scale for each row."""
    return 0 if stored.dim() == 1 else stored.shape[1] * (2 if stored.dtype == torch.uint8 else 1)


def segment_sizes(kept: int, group: int, rows: Tensor | None) -> Tensor:
    """Return the number of kept values of each scale: `rows`, or `group` each with the remainder last."""
    if not group:
        assert rows is not None
        return rows
    # The device is explicit, because transformers builds models while the default device is meta.
    device = "cpu" if rows is None else rows.device
    sizes = torch.full((-(-kept // group),), group, dtype=torch.int64, device=device)
    if kept % group:
        sizes[-1] = kept % group
    return sizes


def restore_stored(bitmask: Tensor, stored: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the values [kept] of a file's codes and scales, on their device.

    Raises:
        ValueError: The mask does not fit the shape.
    """
    rows = row_counts(bitmask, shape)
    kept = int(rows.sum())
    return restore_values(read_codes(stored, kept), scales, segment_sizes(kept, group_of(stored), rows))


def row_counts(bitmask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Count the kept weights of each row, int64 [rows]; rows run along the last dimension.

    Raises:
        ValueError: The mask does not fit the shape.
    """
    numel, columns = math.prod(shape), shape[-1] if shape else 1
    if bitmask.numel() != bitmask_bytes(numel):
        raise ValueError(f"a bitmask of {bitmask.numel()} bytes is not of a tensor of shape {shape}")
    if numel == 0:
        return torch.zeros(math.prod(shape[:-1]), dtype=torch.int64, device=bitmask.device)
    if columns % 8 == 0:
        rows, counts = bitmask[: numel // 8].view(-1, columns // 8), _COUNTS.to(bitmask.device)
        return torch.cat([counts[part.int()].sum(1) for part in rows.split(max(1, _AT_A_TIME // columns))])
    counts, bits = torch.zeros(numel // columns, dtype=torch.int64, device=bitmask.device), _BITS.to(bitmask.device)
    for start in range(0, numel, _AT_A_TIME):
        words = bitmask[start // 8 : -(-min(start + _AT_A_TIME, numel) // 8)]
        place = torch.nonzero(((words[:, None] & bits) != 0).view(-1)).view(-1) + start
        counts += torch.bincount(place // columns, minlength=len(counts))
    return counts


def _codes(values: Tensor, scale: Tensor, most: int) -> Tensor:
    # A segment of all zeros has a scale of 0, so its codes are set to 0 without a division.
    return torch.where(scale > 0, values / scale, 0).round().clamp(-most, most)


def _pieces(sizes: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield runs of whole segments of about a million values: first and last segment, first and last value (exclusive)."""
    ends = sizes.cumsum(0)
    first, start = 0, 0
    while first < len(sizes):
        last = max(first + 1, int(torch.searchsorted(ends, start + _AT_A_TIME, right=True)))
        stop = int(ends[last - 1])
        yield first, last, start, stop
        first, start = last, stop
