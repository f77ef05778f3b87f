"""The contents of a compact file: its tensors, with their dense shapes and the positions of their parts (docs/format.md)."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity.common.safetensors_header import Entry, Header, checked_shape, parse_json, read_header
from sparsity.compact.bitmask import bitmask_bytes

VERSIONS = (1, 2)
"""The versions that can be read. A file is written as version 1, or as 2 if it has rounded values or row starts."""
METHOD = "sparsellm-compact"
"""The `quant_method` in config.json, and the key of the contents in a file's metadata."""
BITMASK, STARTS, SCALES = ".bitmask", ".bitmask_row_starts", ".bitmask_scales"
"""The endings of the names of a tensor's parts; its values have the tensor's own name."""
SUFFIXES = (BITMASK, STARTS, SCALES)
CODE_BITS = {"I8": 8, "U8": 4}
"""Bits of a rounded value, by the type that its code is stored in."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """One tensor of the model: its dense shape and the entries of its parts. A dense tensor has only `values`."""

    name: str
    shape: tuple[int, ...]
    values: Entry
    bitmask: Entry | None
    crc32: int
    starts: Entry | None = None
    """The number of kept weights before each row, and the total at the end: I64 [rows + 1]."""
    scales: Entry | None = None
    """The scales of rounded values; `values` are then codes."""
    kept: int | None = None
    """The number of kept values if they are rounded; None if not, because `values` then has as many items."""

    @property
    def dtype(self) -> str:
        """The type of the dense tensor: that of the scales if values are stored as codes."""
        return (self.scales or self.values).dtype

    @property
    def numel(self) -> int:
        """The number of weights of the dense tensor."""
        return math.prod(self.shape)

    @property
    def num_kept(self) -> int:
        """The number of weights whose values are stored."""
        return self.values.numel if self.kept is None else self.kept

    @property
    def dense_bytes(self) -> int:
        """The size of the dense tensor."""
        return self.values.num_bytes if self.bitmask is None else self.numel * (self.scales or self.values).item_bytes

    @property
    def parts(self) -> dict[str, Entry]:
        """The entries by stored name, in the order of the file and of the checksum."""
        found = {
            self.name + BITMASK: self.bitmask, self.name + STARTS: self.starts, self.name: self.values,
            self.name + SCALES: self.scales,
        }  # fmt: skip
        return {name: entry for name, entry in found.items() if entry is not None}

    @property
    def stored_bytes(self) -> int:
        """The size of all stored parts together."""
        return sum(entry.num_bytes for entry in self.parts.values())


def is_compact(header: Header) -> bool:
    """Return whether a file with this header is in the compact format."""
    return METHOD in header.metadata


def start_crc32(name: str, dtype: str, shape: Iterable[int]) -> int:
    """Return the checksum of a tensor's name, type and shape; the checksum of its parts continues it."""
    return zlib.crc32(f"{name} {dtype} {','.join(map(str, shape))}\n".encode())


def format_contents(tensors: Iterable[Stored]) -> str:
    """Return the text under `METHOD` in a file's metadata."""
    tensors = list(tensors)
    table = {}
    for tensor in tensors:
        field: dict[str, Any] = {} if tensor.bitmask is None else {"shape": list(tensor.shape)}
        if tensor.kept is not None:
            field["kept"] = tensor.kept
        if tensor.starts is not None:
            field["row_starts"] = True
        table[tensor.name] = {**field, "crc32": f"{tensor.crc32:08x}"}
    return json.dumps({"version": version_of(tensors), "tensors": table}, separators=(",", ":"))


def version_of(tensors: Iterable[Stored]) -> int:
    """Return the lowest version that can hold `tensors`."""
    return 2 if any(tensor.kept is not None or tensor.starts is not None for tensor in tensors) else 1


def read_contents(path: Path) -> tuple[Header, list[Stored]]:
    """Return the header of a compact file and its tensors in the order of their data.

    Raises:
        ValueError: The file is not compact, or its header and its list of tensors contradict each other.
    """
    header = read_header(path)
    if not is_compact(header):
        raise ValueError(f"{path} is not compact: it has no {METHOD} in its metadata, so it loads as it is.")
    try:
        return header, _contents(header)
    except ValueError as error:
        raise ValueError(f"{path} is not a sound compact file ({error}): copy it again.") from error


def check_version(version: Any, place: object) -> None:
    """Raise a ValueError if this cannot read a version of the format; `place` says where it was found."""
    if type(version) is not int or version not in VERSIONS:
        raise ValueError(
            f"{place} has version {version!r} of the compact format where this reads 1 and 2: use the version of sparsellm "
            "that wrote it."
        )


def _contents(header: Header) -> list[Stored]:
    table = parse_json(header.metadata[METHOD])
    if not isinstance(table, dict) or set(table) != {"version", "tensors"} or not isinstance(table["tensors"], dict):
        raise ValueError(f"its {METHOD} is not a table of version and tensors")
    check_version(table["version"], "it")
    found, left = [], dict(header.entries)
    for name, field in table["tensors"].items():
        if not isinstance(field, dict) or not {"crc32"} <= set(field) <= {"crc32", "shape", "kept", "row_starts"}:
            raise ValueError(f"{name!r} has other fields than shape, kept, row_starts and crc32")
        if not isinstance(field["crc32"], str) or not re.fullmatch("[0-9a-f]{8}", field["crc32"]):
            raise ValueError(f"{name!r} has a crc32 that is not 8 hexadecimal digits")
        values = left.pop(name, None)
        if values is None:
            raise ValueError(f"{name!r} has no values")
        crc32 = int(field["crc32"], 16)
        if "shape" not in field:
            if len(field) > 1:
                raise ValueError(f"{name!r} has kept or row_starts and no shape")
            found.append(Stored(name, values.shape, values, None, crc32))
            continue
        shape, bitmask = checked_shape(field["shape"]), left.pop(name + BITMASK, None)
        starts = left.pop(name + STARTS, None) if "row_starts" in field else None
        scales = left.pop(name + SCALES, None) if "kept" in field else None
        tensor = Stored(name, shape, values, bitmask, crc32, starts, scales, field.get("kept"))
        _check_sparse(tensor, field)
        found.append(tensor)
    if left:
        raise ValueError(f"it holds {next(iter(left))!r}, which its {METHOD} does not name")
    if table["version"] < version_of(found):
        raise ValueError("it is of version 1 and holds what only version 2 has")
    return sorted(found, key=lambda tensor: tensor.values.start)


def _check_sparse(tensor: Stored, field: dict[str, Any]) -> None:
    name, numel, bitmask, values = tensor.name, tensor.numel, tensor.bitmask, tensor.values
    if bitmask is None:
        raise ValueError(f"{name!r} has no bitmask")
    if bitmask.dtype != "U8" or bitmask.shape != (bitmask_bytes(numel),):
        raise ValueError(f"the bitmask of {name!r} is not U8 of {bitmask_bytes(numel)} bytes, as its shape demands")
    num_rows = math.prod(tensor.shape[:-1])
    if "row_starts" in field and (
        field["row_starts"] is not True
        or tensor.starts is None
        or (tensor.starts.dtype, tensor.starts.shape) != ("I64", (num_rows + 1,))
    ):
        raise ValueError(f"the row starts of {name!r} are not I64 of {num_rows + 1} items, as its shape demands")
    if "kept" not in field:
        if len(values.shape) != 1 or values.numel > numel or not values.item_bytes:
            raise ValueError(f"the values of {name!r} are not a list of at most {numel} items")
        return
    if type(tensor.kept) is not int or not 0 <= tensor.kept <= numel:
        raise ValueError(f"{name!r} keeps a number of values that is not from 0 to {numel}")
    if tensor.scales is None or tensor.scales.dtype not in _FLOATS or values.dtype not in CODE_BITS:
        raise ValueError(f"{name!r} has no scales, or codes that are neither I8 nor U8")
    bits = CODE_BITS[values.dtype]
    codes: tuple[int, ...]
    if len(values.shape) == 1:
        codes, num_scales = (8 * -(-tensor.kept * bits // 64),), num_rows
    else:
        size = values.shape[-1]
        num_scales = -(-tensor.kept // max(1, size * 8 // bits))
        codes = num_scales, size
        if size == 0 or size % 8:
            raise ValueError(f"{name!r} has groups of codes that are no multiple of 8 bytes")
    if values.shape != codes or tensor.scales.shape != (num_scales,):
        raise ValueError(f"{name!r} has other numbers of codes and scales than {tensor.kept} kept values demand")
