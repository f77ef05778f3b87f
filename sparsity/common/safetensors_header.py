"""Reading and writing the header of a safetensors file; every number read is checked against the file's size.

The format's layout: the header's length (u64, little-endian), the header (json), then the tensors one after another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MOST_HEADER_BYTES = 100_000_000
_MOST_DIMS = 64


@dataclass(frozen=True)
class Entry:
    """One stored tensor; `start` is its first byte, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def numel(self) -> int:
        """The number of elements, by the shape."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of an item; 0 if items are not whole bytes."""
        return BITS[self.dtype] // 8 if BITS[self.dtype] % 8 == 0 else 0


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its metadata and its tensors by name."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    num_bytes: int
    """Bytes before the first tensor: the length and the header."""


def read_header(path: Path) -> Header:
    """Return the checked header of `path`; raise a ValueError if it is not a complete, valid safetensors file."""
    # A pipe or a device would block or never end.
    if not path.is_file():
        raise ValueError(f"{path} is not a file: copy the folder again.")
    try:
        with open(path, "rb", buffering=0) as file:
            return _read(file)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid safetensors file ({error}): copy it again.") from error


def format_header(metadata: Mapping[str, str], entries: Mapping[str, Entry], num_bytes: int = 0) -> bytes:
    """Return a header's length and json, padded with spaces to at least `num_bytes` and a multiple of 8."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        offsets = [entry.start, entry.start + entry.num_bytes]
        fields[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(num_bytes - 8)
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER_BYTES:
        raise ValueError(f"{len(entries)} tensors need a header of {len(text)} bytes, safetensors allows 100 MB.")
    return len(text).to_bytes(8, "little") + text


def parse_json(text: str | bytes) -> Any:
    """Parse JSON strictly: raise a ValueError of one line for duplicate keys, NaN, and bytes that are not text."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"its JSON cannot be read: {error}") from error


def checked_shape(shape: Any) -> tuple[int, ...]:
    """Return a list of sizes as a tuple; raise a ValueError for anything else."""
    if not isinstance(shape, list) or len(shape) > _MOST_DIMS:
        raise ValueError("a shape is not a list of at most 64 sizes")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError("a shape has a size that is not a whole number from 0 to 2^63")
    return tuple(shape)


def _read(file: BinaryIO) -> Header:
    total = os.fstat(file.fileno()).st_size
    if total < 8:
        raise ValueError(f"it has {total} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MOST_HEADER_BYTES, total - 8):
        raise ValueError(f"its header claims {length} bytes and the file has {total}")
    fields = parse_json(file.read(length))
    if not isinstance(fields, dict):
        raise ValueError("its header is not a table")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a table of texts")
    entries = {name: _entry(name, field) for name, field in fields.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != end:
            raise ValueError(f"{name!r} begins at byte {entry.start} where {end} is expected")
        end += entry.num_bytes
    if 8 + length + end != total:
        raise ValueError(f"its tensors need {end} bytes and {total - 8 - length} follow its header")
    return Header(metadata, entries, 8 + length)


def _entry(name: str, field: Any) -> Entry:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has other fields than dtype, shape and data_offsets")
    offsets, dtype = field["data_offsets"], field["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} has the unknown type {dtype!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"{name!r} has offsets that are not two whole numbers")
    entry = Entry(dtype, checked_shape(field["shape"]), offsets[0], offsets[1] - offsets[0])
    if offsets[0] < 0 or 8 * entry.num_bytes != entry.numel * BITS[dtype]:
        raise ValueError(f"{name!r} has {entry.num_bytes} bytes, which its shape and type contradict")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
