"""What a compact file holds: its tensors by name, with their dense shapes and where their parts lie (docs/compact.md)."""

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

VERSION = 1
METHOD = "sparsellm-compact"
"""The `quant_method` in config.json, and the key of a file's metadata."""
BITMASK = ".bitmask"
"""What the name of a tensor's mask ends with."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the model: its dense shape, the entry of its values, and that of its mask where it is sparse."""

    name: str
    shape: tuple[int, ...]
    values: Entry
    bitmask: Entry | None
    crc32: int

    @property
    def dtype(self) -> str:
        return self.values.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        return self.values.num_bytes if self.bitmask is None else self.numel * self.values.item_bytes

    @property
    def stored_bytes(self) -> int:
        return self.values.num_bytes + (self.bitmask.num_bytes if self.bitmask else 0)


def is_compact(header: Header) -> bool:
    return METHOD in header.metadata


def start_crc32(name: str, dtype: str, shape: Iterable[int]) -> int:
    """The checksum of what a header says of a tensor; its mask and values continue it."""
    return zlib.crc32(f"{name} {dtype} {','.join(map(str, shape))}\n".encode())


def format_contents(tensors: Iterable[Stored]) -> str:
    """The text under `METHOD` in a file's metadata."""
    table = {}
    for tensor in tensors:
        shape = {} if tensor.bitmask is None else {"shape": list(tensor.shape)}
        table[tensor.name] = {**shape, "crc32": f"{tensor.crc32:08x}"}
    return json.dumps({"version": VERSION, "tensors": table}, separators=(",", ":"))


def read_contents(path: Path) -> tuple[Header, list[Stored]]:
    """The header of a compact file and its tensors in the order of their data; a ValueError where they contradict."""
    header = read_header(path)
    if not is_compact(header):
        raise ValueError(f"{path} is not compact: it has no {METHOD} in its metadata, so it loads as it is.")
    try:
        return header, _contents(header)
    except ValueError as error:
        raise ValueError(f"{path} is not a sound compact file ({error}): copy it again.") from error


def check_version(version: Any, place: object) -> None:
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{place} has version {version!r} of the compact format where this reads {VERSION}: use the version of "
            "sparsellm that wrote it."
        )


def _contents(header: Header) -> list[Stored]:
    table = parse_json(header.metadata[METHOD])
    if not isinstance(table, dict) or set(table) != {"version", "tensors"} or not isinstance(table["tensors"], dict):
        raise ValueError(f"its {METHOD} is not a table of version and tensors")
    check_version(table["version"], "it")
    found, left = [], dict(header.entries)
    for name, field in table["tensors"].items():
        if not isinstance(field, dict) or not {"crc32"} <= set(field) <= {"crc32", "shape"}:
            raise ValueError(f"{name!r} has other fields than shape and crc32")
        if not isinstance(field["crc32"], str) or not re.fullmatch("[0-9a-f]{8}", field["crc32"]):
            raise ValueError(f"{name!r} has a crc32 that is not 8 hexadecimal digits")
        values, bitmask = left.pop(name, None), None
        if values is None:
            raise ValueError(f"{name!r} has no values")
        shape = values.shape
        if "shape" in field:
            shape, bitmask = checked_shape(field["shape"]), left.pop(name + BITMASK, None)
            _check_sparse(name, shape, values, bitmask)
        found.append(Stored(name, shape, values, bitmask, int(field["crc32"], 16)))
    if left:
        raise ValueError(f"it holds {next(iter(left))!r}, which its {METHOD} does not name")
    return sorted(found, key=lambda tensor: tensor.values.start)


def _check_sparse(name: str, shape: tuple[int, ...], values: Entry, bitmask: Entry | None) -> None:
    numel = math.prod(shape)
    if bitmask is None:
        raise ValueError(f"{name!r} has no bitmask")
    if bitmask.dtype != "U8" or bitmask.shape != (bitmask_bytes(numel),):
        raise ValueError(f"the bitmask of {name!r} is not U8 of {bitmask_bytes(numel)} bytes, as its shape demands")
    if len(values.shape) != 1 or values.numel > numel or not values.item_bytes:
        raise ValueError(f"the values of {name!r} are not a list of at most {numel} items")
