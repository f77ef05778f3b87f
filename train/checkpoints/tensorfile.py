"""Safetensors files written one tensor at a time: no second copy of a rank's state, and real `OSError`s.

`safetensors.save_file` wants every tensor on the CPU at once and turns a full disk into an error of its own. The layout
is the format's: the header's length (u64), the header (json, padded to 8 bytes), the tensors one after another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 64 << 20


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What `write_tensors` will need on the disk."""
    return len(_header(tensors)) + sum(_num_bytes(tensor) for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write and sync; the sha256 of the file's bytes. Tensors may lie on any device, one at a time is copied.

    The umask decides on the file's mode; `safetensors.save_file` (0.8) makes it readable for its owner alone.
    """
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for data in chain([memoryview(_header(tensors, metadata))], map(_as_bytes, tensors.values())):
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    offset = 0
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, tensor in tensors.items():
        end = offset + _num_bytes(tensor)
        shape = list(tensor.shape)
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
