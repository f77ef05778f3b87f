"""A separate process for a test on a GPU, so that its settings of CUDA and torch end with it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from tests.distributed import free_port


def in_own_process(body: Callable[..., Any], *args: Any, timeout_s: float = 240) -> Any:
    """Return `body(*args)`, run as the one rank of an FSDP2 world; `body` must be importable.

    Raises:
        multiprocessing.TimeoutError: The function took longer than `timeout_s`; the process is then ended.
    """
    with multiprocessing.get_context("spawn").Pool(1, _become_a_rank, (free_port(),)) as pool:
        return pool.apply_async(body, args).get(timeout_s)


def _become_a_rank(port: int) -> None:
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
