"""The kernels on a GPU, or in Triton's interpreter on a CPU, for tests."""

import importlib
import os
import sys
from functools import cache
from types import ModuleType
from unittest import mock

import pytest
import torch

import sparsity
from sparsity import devices
from tests.kernel_oracles import DTYPES, KINDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def interpreted_launches() -> ModuleType:
    """Return `sparsity.launches` on Triton's interpreter.

    Triton chooses the interpreter when it is imported, so this imports Triton again, and then restores the first one.
    """
    ours = ("sparsity.kernels", "sparsity.zero_kernels", "sparsity.launches")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton" or name in ours}
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for name in before:
            if not name.startswith("triton._C"):
                del sys.modules[name]
        # If they stayed attributes of the package, they would be found without an import.
        for name in ("kernels", "zero_kernels", "launches"):
            vars(sparsity).pop(name, None)
        found = importlib.import_module("sparsity.launches")
    sys.modules.update(before)
    return found


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make every pass on `DEVICE` use the kernels, and return the module that launches them."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for GPUs")
    if DEVICE == "cpu":
        monkeypatch.setattr(devices, "_is_gpu", lambda device: True)
        monkeypatch.setattr(devices, "_launches", lambda device: interpreted_launches())
    launches = devices.kernels_for(torch.device(DEVICE))
    assert launches is not None
    return launches


def cases() -> list[tuple[str, str, int]]:
    """Return (kind, type, storage offset) to test: all on a GPU, a few in the interpreter, which is slow.

    An offset of 3 elements is no multiple of 16 bytes.
    """
    if DEVICE == "cuda":
        return [(kind, dtype, offset) for kind in KINDS for dtype in DTYPES for offset in (0, 3)]
    return [
        ("normal", "float32", 3), ("normal", "bfloat16", 0), ("ties", "bfloat16", 3), ("denormal", "float32", 0),
        ("denormal", "float16", 0), ("mostly zeros", "float32", 0), ("mixed", "float16", 0),
    ]  # fmt: skip
