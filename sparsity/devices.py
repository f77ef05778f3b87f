"""The check that a device can run the Triton kernels of `sparsity.launches`."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch


def kernels_for(device: torch.device) -> ModuleType | None:
    """Return `sparsity.launches` for a GPU; None on other devices and if Triton is not installed or cannot run."""
    return _launches(device) if _is_gpu(device) else None


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _launches(device: torch.device) -> ModuleType | None:
    """Return the module if a test kernel runs. Triton needs a C compiler and Python's headers only when a kernel runs."""
    try:
        from sparsity import launches

        launches.zero_(torch.zeros(1, device=device), torch.zeros(1, dtype=torch.bool, device=device))
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(f"Triton cannot run here, so masks take torch's slower operations: {error}", stacklevel=3)
        return None
    return launches
