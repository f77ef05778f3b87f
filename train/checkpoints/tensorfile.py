"""Writing safetensors files one tensor at a time: this needs no second copy of a rank's state and raises `OSError`s.

`safetensors.save_file` needs every tensor on the CPU at once, raises its own error for a full disk, and makes the file
readable only for its owner (version 0.8).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from sparsity.common.safetensors_header import Entry, format_header

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 64 << 20


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size in bytes of the file that `write_tensors` writes."""
    return len(_header(tensors)) + sum(_num_bytes(tensor) for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write and sync a file, copying one tensor at a time from its device; the umask determines the file's mode.

    Args:
        path: The file to write.
        tensors: Its tensors by name.
        metadata: Text entries for its header.

    Returns:
        The sha256 of the file's bytes.
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
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        entries[name] = Entry(_DTYPES[tensor.dtype], tuple(tensor.shape), offset, _num_bytes(tensor))
        offset += _num_bytes(tensor)
    return format_header(metadata or {}, entries)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
