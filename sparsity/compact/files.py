"""Conversion of one safetensors file to the compact form and back, streamed with less than one tensor in memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from sparsity.common.safetensors_header import Entry, Header, format_header, read_header
from sparsity.compact.bitmask import BLOCK, bitmask_bytes, check_bitmask, compress, expand
from sparsity.compact.contents import (
    BITMASK,
    METHOD,
    SCALES,
    STARTS,
    SUFFIXES,
    Stored,
    format_contents,
    is_compact,
    read_contents,
    start_crc32,
)
from sparsity.compact.pieces import BITS_OF_SIZE, TORCH, How, Pieces, sparse_pieces
from sparsity.compact.rounding import restore_stored, row_counts

Progress = Callable[[int], object]
"""Called with the number of bytes of dense data done since the last call."""
_CHUNK = 4 << 20


def compact_file(
    source: Path, target: Path | None, dtype: str | None = None, progress: Progress = int, how: How | None = None
) -> list[Stored]:
    """Write the compact form of a file and return its tensors. Memory holds at most one tensor's kept values.

    Args:
        source: A plain safetensors file.
        target: The file to write; None to only compute the sizes.
        dtype: Short for `how=How(dtype)`.
        progress: Called with the number of bytes of dense data done since the last call.
        how: The conversion of the values, and additional parts to write; None keeps every bit.

    Raises:
        ValueError: The source is not a valid plain file, or a value cannot be rounded.
    """
    how = how or How(dtype)
    header = read_header(source)
    check_plain(source, header)
    with open(source, "rb", buffering=0) as file:
        if target is None:
            return list(_compacted(file, header, how, progress, None))
        with open(target, "wb", buffering=0) as out:
            room = _room_for_header(header, how)
            out.seek(room)
            stored = list(_compacted(file, header, how, progress, out))
            entries = {name: entry for tensor in stored for name, entry in tensor.parts.items()}
            out.seek(0)
            _write(out, format_header({**header.metadata, METHOD: format_contents(stored)}, entries, room))
            os.fsync(out.fileno())
    return stored


def expand_file(source: Path, target: Path, progress: Progress = int) -> list[Stored]:
    """Write the plain form of the compact file `source` to `target`; raise a ValueError if a tensor is damaged."""
    header, stored = read_contents(source)
    entries, end = {}, 0
    for tensor in stored:
        entries[tensor.name] = Entry(tensor.dtype, tensor.shape, end, tensor.dense_bytes)
        end += tensor.dense_bytes
    metadata = {key: value for key, value in header.metadata.items() if key != METHOD}
    with open(source, "rb", buffering=0) as file, open(target, "wb", buffering=0) as out:
        _write(out, format_header(metadata, entries))
        for tensor in stored:
            for piece in _dense_pieces(file, header, tensor, source):
                _write(out, piece)
                progress(piece.nbytes)
        os.fsync(out.fileno())
    return stored


def check_file(path: Path) -> list[Stored]:
    """Return the tensors of a compact file; raise a ValueError if a checksum or a number of kept weights is wrong."""
    header, stored = read_contents(path)
    with open(path, "rb", buffering=0) as file:
        for tensor in stored:
            if tensor.bitmask is None:
                for _ in _dense_pieces(file, header, tensor, path):
                    pass
            else:
                _read_sparse(file, header, tensor, path)
    return stored


def check_plain(path: Path, header: Header) -> None:
    """Raise a ValueError if a file is compact already, or has tensor names that the format cannot hold."""
    if is_compact(header):
        raise ValueError(f"{path} is compact already: load it after `import sparsity.compact`, or expand it.")
    for name in header.entries:
        for ending in SUFFIXES:
            if name.endswith(ending):
                raise ValueError(
                    f"{path} holds a tensor named {name!r}: names that end with {ending} are of the format."
                )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path} has the tensor name {name!r}, which is no text: rename it.") from error


def _compacted(file: BinaryIO, header: Header, how: How, progress: Progress, out: BinaryIO | None) -> Iterator[Stored]:
    """Write every tensor of `file` to `out` in its compact form, one after another; yield what was written."""
    position = 0
    # Write the widest items first. Masks, starts and codes are whole 64-bit words, so all tensors are then aligned.
    order = sorted(header.entries.items(), key=lambda item: (-_final(item[1], how.dtype).item_bytes, item[1].start))
    for name, entry in order:
        final = _final(entry, how.dtype)
        pieces = _pieces(file, header, name, entry, how)
        crc32 = start_crc32(name, final.dtype, final.shape)
        parts: dict[str, Any] = {"bitmask": None}
        for part, found, data in pieces.parts():
            parts[part] = replace(found, start=position)
            position += found.num_bytes
            # If nothing is written, the data of a dense tensor is never read.
            for piece in data if out is not None else ():
                crc32 = zlib.crc32(piece.data, crc32)
                _write(out, piece)
        progress(entry.num_bytes)
        yield Stored(name, entry.shape, crc32=crc32, kept=pieces.kept if "scales" in parts else None, **parts)


def _pieces(file: BinaryIO, header: Header, name: str, entry: Entry, how: How) -> Pieces:
    """Return a tensor's mask and kept values, or its dense values if these take no more bytes."""
    final = _final(entry, how.dtype)
    dense = Pieces(final, _items(file, header, entry, final.dtype))
    mask_bytes = bitmask_bytes(entry.numel)
    if not final.item_bytes or mask_bytes >= final.num_bytes:
        return dense
    bitmask, position = np.empty(mask_bytes, np.uint8), 0
    kept, num_bytes = [], 0
    for items in _items(file, header, entry, final.dtype):
        bits, values = compress(items)
        bitmask[position : position + bits.size] = bits
        position += bits.size
        kept.append(values)
        num_bytes += values.nbytes
        if num_bytes + mask_bytes >= final.num_bytes:
            return dense
    try:
        return sparse_pieces(bitmask, kept, final, how)
    except ValueError as error:
        raise ValueError(f"{file.name}: {name} cannot be rounded ({error}): keep its values as they are.") from error


def _items(file: BinaryIO, header: Header, entry: Entry, dtype: str) -> Iterator[np.ndarray]:
    """Yield the items of a dense tensor as unsigned integers, a block at a time, converted to `dtype`."""
    size = BLOCK * entry.item_bytes or _CHUNK
    for start in range(0, entry.num_bytes, size):
        data = _read(file, header.num_bytes + entry.start + start, min(size, entry.num_bytes - start))
        if dtype != entry.dtype:
            values = torch.from_numpy(data).view(TORCH[entry.dtype]).to(TORCH[dtype])
            data = values.view(torch.uint8).numpy()
        yield data.view(f"u{_final(entry, dtype).item_bytes or 1}")


def _dense_pieces(file: BinaryIO, header: Header, tensor: Stored, path: Path) -> Iterator[np.ndarray]:
    """Yield the dense items of a stored tensor; a sparse tensor is checked completely first."""
    if tensor.bitmask is not None:
        bitmask, values = _read_sparse(file, header, tensor, path)
        yield from expand(bitmask, values, tensor.numel)
        return
    crc32 = start_crc32(tensor.name, tensor.dtype, tensor.shape)
    for start in range(0, tensor.values.num_bytes, _CHUNK):
        size = min(_CHUNK, tensor.values.num_bytes - start)
        data = _read(file, header.num_bytes + tensor.values.start + start, size)
        crc32 = zlib.crc32(data.data, crc32)
        yield data
    _check_crc32(tensor, crc32, path)


def _read_sparse(file: BinaryIO, header: Header, tensor: Stored, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read and check a sparse tensor; return its mask and its kept items as unsigned integers."""
    data, crc32 = {}, start_crc32(tensor.name, tensor.dtype, tensor.shape)
    for name, entry in tensor.parts.items():
        data[name] = _read(file, header.num_bytes + entry.start, entry.num_bytes)
        crc32 = zlib.crc32(data[name].data, crc32)
    _check_crc32(tensor, crc32, path)
    bitmask, values = data[tensor.name + BITMASK], data[tensor.name]
    try:
        check_bitmask(bitmask, tensor.numel, tensor.num_kept)
        if tensor.starts is not None:
            starts = data[tensor.name + STARTS].view(np.int64)
            rows = row_counts(torch.from_numpy(bitmask), tensor.shape).numpy()
            if starts[0] != 0 or not np.array_equal(np.diff(starts), rows):
                raise ValueError("its row starts are not those of its bitmask")
    except ValueError as error:
        raise ValueError(f"{path}: {tensor.name} is damaged ({error}): copy it again.") from error
    if tensor.scales is None:
        return bitmask, values.view(f"u{tensor.values.item_bytes}")
    codes = torch.from_numpy(values.view(np.int8) if tensor.values.dtype == "I8" else values).view(tensor.values.shape)
    scales = torch.from_numpy(data[tensor.name + SCALES].view(f"i{tensor.scales.item_bytes}")).view(TORCH[tensor.dtype])
    restored = restore_stored(torch.from_numpy(bitmask), codes, scales, tensor.shape)
    return bitmask, restored.view(BITS_OF_SIZE[tensor.scales.item_bytes]).numpy().view(f"u{tensor.scales.item_bytes}")


def _check_crc32(tensor: Stored, found: int, path: Path) -> None:
    if found != tensor.crc32:
        raise ValueError(
            f"{path}: {tensor.name} is damaged (its checksum is {found:08x} where {tensor.crc32:08x} was written): copy "
            "it again."
        )


def _final(entry: Entry, dtype: str | None) -> Entry:
    """Return the dense entry after a conversion to `dtype`, which affects only floating-point tensors."""
    if dtype is None or entry.dtype == dtype or entry.dtype not in TORCH:
        return entry
    return replace(entry, dtype=dtype, num_bytes=entry.numel * TORCH[dtype].itemsize)


def _room_for_header(header: Header, how: How) -> int:
    """Return an upper bound for the bytes of the compact file's header: every tensor has every part, at the highest offsets."""
    end = sum(
        3 * max(entry.num_bytes, 8 * entry.numel) + bitmask_bytes(entry.numel) + 16 for entry in header.entries.values()
    )
    stored, entries = [], {}
    for name, entry in header.entries.items():
        # No conversion gives a longer type name than this, and a list of codes has at most two sizes.
        shape = (*entry.shape, end, end)
        values = Entry(max(entry.dtype, "BF16", key=len), shape, end, 0)
        more = values if how.rounding else None
        stored.append(
            Stored(name, shape, values, values, 0, values if how.row_starts else None, more, end if more else None)
        )
        entries.update(stored[-1].parts)
    return len(format_header({**header.metadata, METHOD: format_contents(stored)}, entries))


def _read(file: BinaryIO, start: int, size: int) -> np.ndarray:
    data = np.empty(size, np.uint8)
    file.seek(start)
    view = data.data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{file.name} ended while it was read: copy it again.")
        view = view[count:]
    return data


def _write(out: BinaryIO | None, data: np.ndarray | bytes) -> None:
    if out is None or len(data) == 0:
        return
    view = memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")
    while view:
        view = view[out.write(view) :]
