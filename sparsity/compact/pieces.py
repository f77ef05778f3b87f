"""The parts of a tensor for a compact file, before their position in the file is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from sparsity.common.safetensors_header import Entry
from sparsity.compact.rounding import Rounding, round_values, row_counts, segment_sizes, stored_codes

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = {str(dtype).removeprefix("torch."): name for name, dtype in TORCH.items()}
BITS_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class How:
    """The options of a conversion: what is written instead of, or in addition to, the exact kept values.

    Args:
        dtype: F64, F32, F16 or BF16; floating-point tensors are converted to it first. None keeps every bit.
        rounding: How the kept values of sparse floating-point tensors are rounded; None keeps every bit.
        row_starts: Whether to also write the number of kept weights before each row, for readers of single rows.
    """

    dtype: str | None = None
    rounding: Rounding | None = None
    row_starts: bool = False


@dataclass(frozen=True)
class Pieces:
    """A tensor ready to be written: its values in pieces, and its other parts if it is sparse."""

    entry: Entry
    """The entry of the values, without their position in the file."""
    values: Iterable[np.ndarray]
    bitmask: np.ndarray | None = None
    starts: np.ndarray | None = None
    scales: np.ndarray | None = None
    scales_dtype: str = ""
    kept: int = 0
    """The number of kept values."""

    def parts(self) -> Iterator[tuple[str, Entry, Iterable[np.ndarray]]]:
        """Yield the name, entry and data of each part, in the order of the file; entries start at 0."""
        for name, dtype, array in (("bitmask", "U8", self.bitmask), ("starts", "I64", self.starts)):
            if array is not None:
                yield name, Entry(dtype, array.shape, 0, array.nbytes), [array]
        yield "values", self.entry, self.values
        if self.scales is not None:
            yield "scales", Entry(self.scales_dtype, self.scales.shape, 0, self.scales.nbytes), [self.scales]


def sparse_pieces(bitmask: np.ndarray, kept: list[np.ndarray], final: Entry, how: How) -> Pieces:
    """Return the parts of a sparse tensor.

    Args:
        bitmask: The tensor's mask.
        kept: The kept values in pieces, as unsigned integers.
        final: The entry of the dense tensor.
        how: The options of the conversion.

    Raises:
        ValueError: A value to be rounded is not finite.
    """
    num_kept = sum(piece.size for piece in kept)
    rounding = how.rounding if final.dtype in TORCH else None
    rows = starts = None
    if how.row_starts or (rounding is not None and not rounding.group):
        rows = row_counts(torch.from_numpy(bitmask), final.shape)
    if how.row_starts and rows is not None:
        starts = np.concatenate([np.zeros(1, np.int64), rows.cumsum(0).numpy()])
    if rounding is None:
        entry = replace(final, shape=(num_kept,), num_bytes=num_kept * final.item_bytes)
        return Pieces(entry, kept, bitmask, starts, kept=num_kept)
    values = torch.from_numpy(np.concatenate(kept).view(np.uint8)).view(TORCH[final.dtype])
    codes, scales = round_values(values, segment_sizes(num_kept, rounding.group, rows), rounding)
    stored = stored_codes(codes, rounding)
    entry = Entry("I8" if rounding.bits == 8 else "U8", stored.shape, 0, stored.nbytes)
    bits = scales.view(BITS_OF_SIZE[scales.element_size()]).numpy()
    return Pieces(entry, [stored], bitmask, starts, bits, final.dtype, num_kept)
