"""The model that `tests.benchmarks.event` prunes, and timers of what a device does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity import Geometric
from sparsity.pruner import Pruner

SPARSITY, NUM_EVENTS = 0.8, 20


@dataclass(frozen=True)
class Size:
    """Sizes of a model, from which the shapes of its linear layers follow."""

    hidden: int
    mlp: int
    layers: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, int]]:
        layer = [(self.hidden, self.hidden)] * 4 + [(self.mlp, self.hidden)] * 2 + [(self.hidden, self.mlp)]
        return [*layer * self.layers, (self.vocabulary, self.hidden)]


ONE_B, TINY = Size(2048, 8192, 16, 32_000), Size(16, 48, 1, 64)


def timer(device: str) -> Callable[[], Callable[[], float]]:
    """Return a function that starts a timer on the device, and returns a function that stops it and gives its seconds."""

    def begin() -> Callable[[], float]:
        if device == "cpu":
            started = time.perf_counter()
            return lambda: time.perf_counter() - started
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()

        def end() -> float:
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) / 1000

        return end

    return begin


def best(body: Callable[[], Any], device: str, before: Callable[[], Any] = lambda: None, rounds: int = 4) -> float:
    """Return the minimum of a call's seconds on the device, after a warm-up; `before` is called first and not timed."""
    seconds = []
    for _ in range(rounds + 1):
        before()
        end = timer(device)()
        body()
        seconds.append(end())
    return min(seconds[1:])


def copy_bandwidth(device: str, numel: int) -> float:
    """Return the bandwidth of a copy: the bytes per second that it reads and writes together."""
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), device, rounds=8)


class Model:
    """Weights, moments and a pruner over them."""

    def __init__(self, size: Size, device: str, num_events: int) -> None:
        layers = []
        for rows, columns in size.shapes():
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(torch.empty(rows, columns, device=device))
            layers.append(layer)
        self.module = nn.ModuleList(layers)
        self.weights: list[Tensor] = [layer.weight.detach() for layer in layers]
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.moments: list[Tensor] = []
        for param in self.module.parameters():
            moments = {name: torch.ones_like(param) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[param] = moments
            self.moments += moments.values()
        self.numel = sum(weight.numel() for weight in self.weights)
        self.pruner = Pruner(Geometric(SPARSITY, 0, num_events - 1, 1))
        self.start_anew()

    def start_anew(self) -> None:
        """Reset weights, moments and masks to dense ones."""
        for number, weight in enumerate(self.weights):
            generator = torch.Generator(weight.device).manual_seed(number)
            weight.normal_(0, 0.02, generator=generator)
        for moment in self.moments:
            moment.fill_(1.0)
        self.pruner.bind(self.module)
        self.pruner.unbind()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str, reset: bool = False) -> int:
    if device == "cpu":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()
