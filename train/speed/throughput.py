"""The speed of training: tokens per second, share of the device's peak FLOP/s, time spent waiting for data, memory.

The clock never makes the host wait for the device. On a GPU, events in the stream mark the pauses. They are read when a
step is logged, because by then the host has waited for the loss anyway.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.plan.counts import flops_per_token
from train.plan.devices import Precision, peak_tflops
from train.plan.run import RunPlan

GIB = 1 << 30


@dataclass(frozen=True)
class Lap:
    """Seconds since the previous lap: those in training steps, and the part of them spent waiting for data."""

    train_seconds: float
    data_wait_seconds: float


class StepClock:
    """A timer of the training steps between two logged ones, without prune events, evaluation and saving.

    Args:
        device: The device that trains.
        is_read: Whether this rank logs; if not, the clock records no pauses.
    """

    def __init__(self, device: torch.device, is_read: bool = True) -> None:
        self._on_gpu = device.type == "cuda"
        self._is_read = is_read
        self._since = time.perf_counter()
        self._pauses: list[tuple[Any, Any]] = []
        self._data_wait = 0.0

    def start(self) -> None:
        """Begin a lap now, and discard earlier times."""
        self._since, self._pauses, self._data_wait = time.perf_counter(), [], 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the enclosed code out of the lap's training time."""
        if not self._is_read:
            yield
            return
        begin = self._mark()
        try:
            yield
        finally:
            self._pauses.append((begin, self._mark()))

    @contextlib.contextmanager
    def wait_for_data(self) -> Iterator[None]:
        """Count the enclosed code as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._data_wait += time.perf_counter() - begin

    def lap(self) -> Lap:
        """Return the lap's times and begin the next; on a GPU, wait until the last pause is over."""
        now = time.perf_counter()
        paused = sum(self._seconds(*pause) for pause in self._pauses)
        found = Lap(max(now - self._since - paused, 1e-9), self._data_wait)
        self._since, self._pauses, self._data_wait = now, [], 0.0
        return found

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if not self._on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Speedometer:
    """The perf/... figures of a run; `peak` is that of one device in 1e12 FLOP/s, None if it is unknown."""

    flops_per_token: float
    num_devices: int
    device: torch.device
    peak: float | None = None

    def figures(self, num_tokens: int, lap: Lap) -> dict[str, float]:
        """Return the figures for the `num_tokens` since the previous logged step.

        On a CPU these are only tokens per second and the time spent waiting for data.
        """
        rate = num_tokens / lap.train_seconds
        found = {"perf/tokens_per_second": rate, "perf/data_wait_seconds": lap.data_wait_seconds}
        if self.device.type != "cuda":
            return found
        tflops = rate * self.flops_per_token / self.num_devices / 1e12
        found |= {"perf/tokens_per_second_per_gpu": rate / self.num_devices, "perf/tflops": tflops}
        if self.peak is not None:
            found["perf/mfu"] = tflops / self.peak
        found["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        found["perf/peak_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        return found


def speedometer(plan: RunPlan, device: torch.device, precision: Precision) -> Speedometer:
    """Return the run's speedometer; if the peak of the GPU is unknown, warn on stderr and leave out the MFU."""
    flops = flops_per_token(plan.model, plan.counts.linear, plan.sequence_length)
    peak = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_tflops(name, precision)
        if peak is None:
            print(
                f"warning: {name} has no {precision} peak in train/plan/devices.py: perf/mfu is not logged, perf/tflops is.",
                file=sys.stderr,
                flush=True,
            )
    return Speedometer(flops, plan.world_size, device, peak)
