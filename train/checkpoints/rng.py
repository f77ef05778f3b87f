"""States of the random generators as byte tensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """Return the states of this process's generators: torch's on CPU and GPU, Python's and numpy's; uint8 [n] each."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is the one to keep
    states = {
        "torch": torch.get_rng_state(),
        "python": _as_bytes(random.getstate()),
        "numpy": _as_bytes([name, np.asarray(keys).tolist(), *rest]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = _from_bytes(states["numpy"])
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _as_bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> list:
    return json.loads(data.numpy().tobytes())
