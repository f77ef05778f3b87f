"""The kept weights of a matrix in an order that a GPU multiplies fast: a value and one byte for the column of each.

A row's kept weights are split into `8 * num_chunks` groups of `lanes` consecutive weights; each row has its own `lanes`. A
group has a base, at or shortly before the column of its first weight, and the byte of a weight is its distance from the base.
Eight groups form a chunk, in which lane l of a warp holds weight l of every group:

    values, offsets [words, 8]            word = starts[row] + chunk * lanes + lane, column in the word = group % 8
    bases           [rows, num_chunks, 8] column of the base >> shift
    starts          [rows + 1]            words before each row; lanes = (starts[row + 1] - starts[row]) / num_chunks

So a lane reads 8 values and 8 bytes at once, and at each step the 32 lanes read nearby elements of the vector, which are in
few cache lines. Bases are bytes if rounding them down to multiples of `1 << shift` still leaves distances below 256; otherwise
they are exact, in int16 or int32. A row ends in up to `8 * num_chunks - 1` fillers. Their values have no bits set, whereas
every kept weight has at least one. If groups would need far more chunks to span less than 256 columns, the matrix stores
columns instead of distances and has no bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity.compact.rounding import restore_values

LANES, SLOTS = 32, 8
CHUNK = LANES * SLOTS
_MOST_MORE_CHUNKS = 4
_BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Packed:
    """A packed matrix of `rows` x `columns`, in the layout that the module describes."""

    values: Tensor
    offsets: Tensor
    bases: Tensor
    starts: Tensor
    columns: int
    num_chunks: int
    shift: int = 0
    scales: Tensor | None = None
    """For int8 values: the float32 factor of each row."""

    @property
    def rows(self) -> int:
        """The number of output features."""
        return self.starts.numel() - 1

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        tensors = (self.values, self.offsets, self.bases, self.starts, self.scales)
        return sum(t.nbytes for t in tensors if t is not None)


def pack(weight: Tensor) -> Packed:
    """Pack the kept weights of a matrix: those with at least one bit set, so that `unpack` is exact.

    Args:
        weight: A matrix on any device, of a floating-point type.

    Raises:
        ValueError: It does not have two dimensions, or has 2^31 or more kept weights.
    """
    if weight.dim() != 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix: pack the weight of a linear layer")
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    row, column = torch.nonzero(_bits(weight), as_tuple=True)
    if row.numel() >= 1 << 31:
        raise ValueError(f"a weight of {row.numel()} kept values is too large: pack one of less than 2^31")
    counts = torch.bincount(row, minlength=rows)
    number = torch.arange(row.numel(), device=weight.device) - (counts.cumsum(0) - counts)[row]
    fewest = max(1, -(-int(counts.max()) // CHUNK)) if rows else 1
    num_chunks, found = fewest, None
    while found is None and num_chunks <= _MOST_MORE_CHUNKS * fewest:
        lanes = -(-counts // (SLOTS * num_chunks))
        group, lane = _places(number, lanes[row])
        found = _narrow(row, column, group, lane == 0, (rows, num_chunks * SLOTS), columns)
        if found is None:
            num_chunks += max(1, num_chunks // 4)
    if found is None:
        num_chunks = fewest
        lanes = -(-counts // (SLOTS * num_chunks))
        group, lane = _places(number, lanes[row])
        found = torch.zeros(0, dtype=_index_type(columns), device=weight.device), column.to(_index_type(columns)), 0
    bases, offsets, shift = found
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    starts[1:] = (lanes * num_chunks).cumsum(0)
    place = (starts[row] + group // SLOTS * lanes[row] + lane) * SLOTS + group % SLOTS
    num_places = SLOTS * int(starts[-1])
    values = torch.zeros(num_places, dtype=weight.dtype, device=weight.device)
    values[place] = weight[row, column]
    packed_offsets = torch.zeros(num_places, dtype=offsets.dtype, device=weight.device)
    packed_offsets[place] = offsets
    return Packed(
        values.view(-1, SLOTS), packed_offsets.view(-1, SLOTS), bases.view(-1, num_chunks, SLOTS), starts.to(torch.int32),
        columns, num_chunks, shift,
    )  # fmt: skip


def _narrow(
    row: Tensor, column: Tensor, group: Tensor, is_first: Tensor, shape: tuple[int, int], columns: int
) -> tuple[Tensor, Tensor, int] | None:
    """Return the groups' bases, the distances as bytes, and the bases' shift; None if a group spans too many columns."""
    first = torch.zeros(shape, dtype=torch.int64, device=row.device)
    first[row[is_first], group[is_first]] = column[is_first]
    byte_shift = max(0, (columns - 1).bit_length() - 8)
    for shift, index_type in ((byte_shift, torch.uint8), (0, _index_type(columns))):
        offsets = column - (first >> shift << shift)[row, group]
        if row.numel() == 0 or int(offsets.max()) < 256:
            return (first >> shift).to(index_type), offsets.to(torch.uint8), shift
    return None


def _index_type(columns: int) -> torch.dtype:
    return torch.int16 if columns < 1 << 15 else torch.int32


def _bits(values: Tensor) -> Tensor:
    return values.view(_BITS_OF_SIZE[values.element_size()])


def rounded(packed: Packed) -> Packed:
    """Return `packed` with values rounded to int8, and for each row a scale: its largest magnitude divided by 127."""
    row = torch.repeat_interleave(packed.starts.diff().long())
    most = torch.zeros(packed.rows, device=row.device)
    most.scatter_reduce_(0, row, packed.values.abs().amax(1).float(), "amax")
    scales = most / 127
    values = (packed.values.float() / scales.clamp_min(1e-30)[row, None]).round().to(torch.int8)
    return replace(packed, values=values, scales=scales)


def coded(packed: Packed, scales: Tensor) -> Packed | None:
    """Return `packed` with values as the int8 codes of a rounded file; None if codes and scales do not give its values.

    Args:
        packed: A matrix whose values were restored from codes.
        scales: The scale of each row, in the file's type.
    """
    if scales.numel() != packed.rows or scales.dtype == torch.float64:
        return None
    sizes = packed.starts.diff().long()
    of_word = torch.repeat_interleave(scales.float(), sizes)[:, None]
    codes = (packed.values.float() / of_word).round().clamp(-127, 127).to(torch.int8)
    restored = restore_values(codes.view(-1), scales, SLOTS * sizes).to(packed.values.dtype)
    if not torch.equal(restored.view_as(codes), packed.values):
        return None
    return replace(packed, values=codes, scales=scales.float())


def rows_of(packed: Packed, first: int, last: int) -> Packed:
    """Return rows `first` to `last` (exclusive) as views; the values of all rows are still in its storage."""
    scales = None if packed.scales is None else packed.scales[first:last]
    bases = packed.bases[first:last] if packed.bases.numel() else packed.bases
    return replace(packed, bases=bases, starts=packed.starts[first : last + 1], scales=scales)


def concatenate(parts: Sequence[Packed]) -> Packed:
    """Return the rows of all matrices in order, as one matrix.

    Matrices of the same layout keep it, and each row then has the same product to the last bit. Others are packed again with
    the most chunks of all of them, which changes the order of sums.

    Args:
        parts: Matrices with the same columns, device and type of values, all with scales or none.
    """
    first = parts[0]
    scales = None if first.scales is None else torch.cat([part.scales for part in parts if part.scales is not None])
    if len({(part.num_chunks, part.shift, part.bases.dtype, part.offsets.dtype) for part in parts}) > 1:
        return replace(pack(torch.cat([unpack(replace(part, scales=None)) for part in parts])), scales=scales)
    starts, num_words = [first.starts[:1]], 0
    for part in parts:
        starts.append(part.starts[1:] + num_words)
        num_words += len(part.values)
    values, offsets, bases = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("values", "offsets", "bases")
    )
    return replace(first, values=values, offsets=offsets, bases=bases, starts=torch.cat(starts), scales=scales)


def _places(number: Tensor, lanes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group and lane of each weight from its number in its row."""
    group = number // lanes
    return group, number - group * lanes


def unpack(packed: Packed, first: int = 0, last: int | None = None, words: tuple[int, int] | None = None) -> Tensor:
    """Return rows of a matrix as a dense one, bit for bit, in plain torch.

    Args:
        packed: The matrix.
        first: The first row.
        last: The end of the rows (exclusive); None: all that follow.
        words: The words in which the rows begin and end. If None, the host reads these two numbers from the device.
    """
    last = packed.rows if last is None else last
    start, stop = words or packed.starts[[first, last]].tolist()
    word = torch.arange(start, stop, device=packed.values.device)
    starts = packed.starts.long()
    row = torch.searchsorted(starts[1:], word, right=True)
    begin = starts[row]
    lanes = (starts[row + 1] - begin) // packed.num_chunks
    chunk = (word - begin) // lanes
    column = packed.offsets[start:stop].long()
    if packed.bases.numel():
        column = column + (packed.bases[row, chunk].long() << packed.shift)
    is_filler = _bits(packed.values[start:stop]) == 0
    # Fillers are written to an extra place at the end, because a real weight may be at the column that they name.
    num_weights = (last - first) * packed.columns
    place = torch.where(is_filler, num_weights, (row - first)[:, None] * packed.columns + column)
    out = torch.zeros(num_weights + 1, dtype=packed.values.dtype, device=word.device)
    out[place] = packed.values[start:stop]
    dense = out[:num_weights].view(last - first, packed.columns)
    return dense if packed.scales is None else dense * packed.scales[first:last, None]
