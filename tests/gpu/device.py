"""Describe this machine in a few seconds: versions, memory, copy bandwidth, and the rate of a bf16 matrix product."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.common import machine
from tests.gpu.runner import FIGURES


def seconds_of(body: Callable[[], Any], rounds: int, device: str) -> float:
    """Return the median seconds of a call, after two calls as a warm-up."""
    taken = []
    for index in range(rounds + 2):
        if device == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            body()
            after.record()
            after.synchronize()
            seconds = before.elapsed_time(after) / 1e3
        else:
            started = time.perf_counter()
            body()
            seconds = time.perf_counter() - started
        if index >= 2:
            taken.append(seconds)
    return statistics.median(taken)


def copy_bandwidth(num_bytes: int, device: str) -> float:
    """Return the bandwidth of a copy on the device: the bytes per second that it reads and writes together."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), 10, device)


def product_flops(size: int, device: str) -> float:
    """Return the FLOP/s of a bf16 product of two square matrices of random numbers."""
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: first @ second, 20, device)


def describe(rehearse: bool) -> dict[str, Any]:
    device = "cpu" if rehearse else "cuda"
    found: dict[str, Any] = {
        **machine(),
        "copy_bytes_per_second": copy_bandwidth(1 << (22 if rehearse else 31), device),
        "bf16_flops": product_flops(128 if rehearse else 8192, device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu_memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": torch.cuda.nccl.version(),
            "bytes_in_use_at_start": properties.total_memory - torch.cuda.mem_get_info()[0],
        }  # fmt: skip
    return found


def main() -> None:
    rehearse = "--rehearse" in sys.argv
    if not rehearse and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here: run on a machine with one, or add --rehearse.")
    found = describe(rehearse)
    if FIGURES in os.environ:
        Path(os.environ[FIGURES]).write_text(json.dumps(found))
    gpu = found.get("gpu", "no GPU")
    memory = f", {found['gpu_memory_bytes'] / 2**30:.1f} GiB" if "gpu_memory_bytes" in found else ""
    print(
        f"{gpu}{memory}, torch {found['torch']}, copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"bf16 {found['bf16_flops'] / 1e12:.1f} TFLOP/s"
    )


if __name__ == "__main__":
    main()
