"""The profile of three updates: the operations that take the most time, and a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.throughput_variants import Workload

MOST_TRACE_BYTES = 15 << 20


def profiled(
    step: Callable[[Tensor], Tensor], work: Workload, device: str, trace: Path | None = None, rows: int = 25
) -> list[dict[str, Any]]:
    """Return the most expensive operations of three steps, in device microseconds; write all to `trace` as .json.gz."""
    batches = work.batches(device)
    with torch.profiler.profile() as found:
        for index in range(3):
            step(batches[index])
        if device == "cuda":
            torch.cuda.synchronize()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
        if trace.stat().st_size > MOST_TRACE_BYTES:
            trace.unlink()
    return top_operations(found.key_averages(), device, rows)


def top_operations(events: Any, device: str, rows: int) -> list[dict[str, Any]]:
    """Return the most expensive operations; on a GPU only kernels, because an operation's row repeats their time."""
    if device == "cuda":
        events = [event for event in events if "CUDA" in str(event.device_type)]

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)

    events = sorted(events, key=own_time, reverse=True)
    total = sum(own_time(event) for event in events) or 1.0
    return [
        {
            "name": event.key[:160],
            "microseconds": own_time(event),
            "share": own_time(event) / total,
            "calls": event.count,
        }
        for event in events[:rows]
    ]
