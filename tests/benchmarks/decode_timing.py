"""The rows and clocks that the decoding benchmarks share: captured launches, and copies of weights that are in no cache."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.compact.packed import Packed
from tests.benchmarks.common import write_rows

Call = Callable[[], Any]
MORE_THAN_CACHES = 150_000_000
"""The bytes of all copies of a weight together. They take turns, so that none is in the cache; an H200's L2 has 60 MB."""


class Rows:
    """The rows of the file, which is written after each row. A part that fails or is too late gives a row that says why."""

    def __init__(self, output: Path, seconds: float) -> None:
        self.output, self.deadline = output, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "name"]
        print(f"{row['name']}: {', '.join(words)}", flush=True)
        write_rows(self.rows, self.output)

    def attempt(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Return the value of a part, or None if it fails or there is no time for it."""
        if time.monotonic() > self.deadline:
            self.add({"name": name, "left_out": "out of time"})
            return None
        try:
            return part(*arguments)
        except Exception as error:
            traceback.print_exc()
            reason = next(iter(str(error).splitlines()), "")
            self.add({"name": name, "failed": f"{type(error).__name__}: {reason}"})
            return None


def seconds_of_each(calls: Sequence[Call], device: str, rounds: int = 7) -> float:
    """Return the median seconds per call of `calls` run in sequence, after a warm-up; on a GPU as one captured graph."""
    for call in calls:
        call()
    if device == "cpu":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    graph = captured(calls)
    return replayed(graph, rounds) / len(calls)


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    """Return the median seconds of a replay."""
    taken = []
    for _ in range(rounds + 2):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last) / 1e3)
    return statistics.median(taken[2:])


def turns(nbytes: int, device: str) -> int:
    """Return the number of copies of `nbytes` bytes that take turns."""
    return 1 if device == "cpu" else min(96, max(4, -(-MORE_THAN_CACHES // nbytes)))


def copies(packed: Packed, count: int) -> list[Packed]:
    def copy() -> Packed:
        parts = {name: part.clone() for name, part in vars(packed).items() if isinstance(part, Tensor)}
        return replace(packed, **parts)

    return [packed, *(copy() for _ in range(count - 1))]
