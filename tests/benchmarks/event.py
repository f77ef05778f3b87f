"""Measure a prune event on a GPU, pass by pass, against the time to move its bytes.

    python -m tests.benchmarks.event [--rehearse] [--output FILE]     -> runs/bench/event.json

The 113 prunable parameters of the 1B, in float32 with two moments, are pruned in the 20 events of a geometric schedule. The
passes of an event are timed on the device. The event itself is timed by the clock, including its last wait for the device.
The ideal event reads weights twice, writes masks, reads and writes weights and two moments under masks, and counts: 37 bytes
per weight, at the bandwidth of a copy measured in the same run. A sweep finds the best block size and number of warps for
each kernel (`sparsity.launches` holds the choice). `--rehearse` does the same at a tiny size on a CPU, with Triton's
interpreter if Triton is installed: its seconds mean nothing. Exits with 1 if a goal is missed, but not in a rehearsal.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparsity import devices
from sparsity.select import prune_smallest_
from tests.benchmarks.common import RESULTS, Comparison, finish, interpret_kernels, write_rows
from tests.benchmarks.event_model import NUM_EVENTS, ONE_B, TINY, Model, Size, copy_bandwidth, peak, synchronize, timer
from tests.benchmarks.event_sweep import REHEARSED, SWEPT, Shapes, sweep

NUM_REHEARSED = 2
IDEAL_BYTES = 4 + 5 + 3 * 8 + 3 + 1
"""The bytes that an event moves for each weight: collect, keep, zero three tensors each by its mask, count."""
PASSES = {
    "sample": 0, "collect": 4, "count_by_shard": 4, "count_digits": 0, "histogram_of_keys": 0, "keep_above_": 5,
    "keep_after_ties_": 0, "count_kept": 1, "zero_all_": 13,
}  # fmt: skip
"""The passes of `sparsity.launches`, and the least bytes that each moves for a weight."""
MOST_OF_IDEAL, MOST_READ_PASSES, MOST_EXTRA_SHARE = 1.3, 3.0, 0.01
MOST_MASKING_SECONDS = 0.01 * 0.230
"""A hundredth of a dense step of the 1B on an H100."""
KTHVALUE_BYTES = 12
"""The bytes that `kthvalue` takes for each weight in addition to weights, moments and masks."""


@contextlib.contextmanager
def timed_passes(device: str, seconds: dict[str, list[Callable[[], float]]]) -> Iterator[None]:
    """Time each pass of `sparsity.launches` on the device while the context is open."""
    launches = devices.kernels_for(torch.device(device))

    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            end = Pending(device)
            value = original(*args, **kwargs)
            seconds[name].append(end.stop())
            return value

        return run

    with contextlib.ExitStack() as stack:
        for name in PASSES if launches is not None else ():
            stack.enter_context(mock.patch.object(launches, name, timed(name, getattr(launches, name))))
        yield


class Pending:
    """A measurement that does not make the host wait; its seconds are read at the end."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._started: Any = self._mark()

    def stop(self) -> Callable[[], float]:
        stopped = self._mark()
        if self._device == "cpu":
            return lambda: float(stopped - self._started)
        return lambda: float(self._started.elapsed_time(stopped)) / 1000

    def _mark(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Event:
    """One event: its seconds by the clock, those of its selection and of its passes, and its extra memory in bytes."""

    density: float
    seconds: float
    selection: float
    passes: dict[str, float]
    extra_bytes: int


def run_events(model: Model, device: str) -> list[Event]:
    """Run all events of the schedule, starting with dense weights; check that each prunes as many as it should."""
    model.start_anew()
    found = []
    for step in model.pruner.schedule.events():
        density = model.pruner.schedule.density(step)
        pending: dict[str, list[Callable[[], float]]] = defaultdict(list)
        selection: list[float] = []

        def select(*args: Any, selection: list[float] = selection, **kwargs: Any) -> Any:
            synchronize(device)
            started = time.perf_counter()
            threshold = prune_smallest_(*args, **kwargs)
            synchronize(device)
            selection.append(time.perf_counter() - started)
            return threshold

        before = peak(device, reset=True)
        with timed_passes(device, pending), mock.patch("sparsity.event.pool.prune_smallest_", select):
            synchronize(device)
            started = time.perf_counter()
            model.pruner.prune(density, model.optimizer)
            synchronize(device)
            taken = time.perf_counter() - started
        extra = peak(device) - before
        kept = sum(model.pruner.kept.values())
        assert kept == model.numel - round((1 - density) * model.numel), f"{kept:,} weights are kept at {density}"
        passes = {name: sum(one() for one in some) for name, some in pending.items()}
        found.append(Event(density, taken, sum(selection), passes, extra))
    return found


def check_masks(model: Model) -> None:
    """Compare masks and zeros with those of a single threshold, on copies in the CPU's memory."""
    model.start_anew()
    before = [weight.cpu() for weight in (model.weights[0], model.weights[-1])]
    model.pruner.prune(0.5, model.optimizer)
    assert model.pruner.threshold is not None
    for old, weight, shard in zip(
        before, model.weights[:: len(model.weights) - 1], model.pruner.shards[:: len(model.weights) - 1], strict=True
    ):
        kept = old.abs() > model.pruner.threshold
        # Some of the weights equal to the threshold may be kept.
        differ = kept.view(-1) != shard.mask.cpu()
        assert bool((old.view(-1)[differ].abs() == model.pruner.threshold).all()), f"{shard.name} has another mask"
        assert torch.equal(weight.cpu(), old * shard.mask.cpu().view(old.shape)), f"{shard.name} has other weights"


def by_kthvalue(model: Model, device: str) -> float | None:
    """Time `kthvalue` over all magnitudes at once, and the masks; return None if there is not enough memory.

    One call takes seconds, so there is no warm-up.
    """
    if device == "cuda" and torch.cuda.mem_get_info()[0] < KTHVALUE_BYTES * model.numel:
        return None

    def body() -> list[Tensor]:
        scores = torch.cat([weight.abs().view(-1) for weight in model.weights])
        threshold = scores.kthvalue(model.numel // 2).values
        return [weight.abs() > threshold for weight in model.weights]

    end = timer(device)()
    body()
    return end()


def measure(size: Size, device: str, shapes: Shapes) -> list[Comparison]:
    """Return all rows, and print a line for each when it is measured."""
    rows: list[Comparison] = []

    def row(name: str, seconds: float, baseline: str, baseline_seconds: float, **details: Any) -> None:
        rows.append(
            Comparison(name, seconds, baseline, baseline_seconds, {"numel": model.numel, "device": device, **details})
        )
        more = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in details.items()
        )
        print(f"{name:<36} {seconds * 1000:9.3f} ms, {baseline} {baseline_seconds * 1000:.3f} ms; {more}", flush=True)

    model = Model(size, device, NUM_EVENTS if device == "cuda" else NUM_REHEARSED)
    bandwidth = copy_bandwidth(device, min(model.numel, 1 << 28))
    print(
        f"copy: {bandwidth / 1e9:.0f} GB/s read and written; {model.numel:,} weights in {len(model.weights)} parameters"
    )
    ideal, read_pass = IDEAL_BYTES * model.numel / bandwidth, 4 * model.numel / bandwidth
    check_masks(model)
    run_events(model, device)
    events = run_events(model, device)
    for number, event in enumerate(events):
        if number in (0, len(events) // 2, len(events) - 1):
            row(
                f"event to a density of {event.density:.2f}", event.seconds, "time to move its bytes", ideal,
                of_ideal=event.seconds / ideal, gigabytes=IDEAL_BYTES * model.numel / 1e9,
                extra_share=event.extra_bytes / (4 * model.numel),
            )  # fmt: skip
            row(
                f"selection at {event.density:.2f}", event.selection, "one read pass", read_pass,
                read_passes=event.selection / read_pass,
            )  # fmt: skip
            for name, seconds in event.passes.items():
                moved = PASSES[name] * model.numel
                share = {"of_copy_bandwidth": moved / seconds / bandwidth} if moved and seconds else {}
                row(
                    f"{name} at {event.density:.2f}", seconds, "its bytes at a copy's speed", moved / bandwidth, **share
                )
    with mock.patch.object(devices, "_is_gpu", return_value=False):
        plain = run_events(model, device)
    middle = len(events) // 2
    row("event", events[middle].seconds, "the same in torch's operations", plain[middle].seconds)
    kthvalue = by_kthvalue(model, device)
    if kthvalue is not None:
        row("selection", events[middle].selection, "kthvalue", kthvalue)
    swept = sweep(model, device, shapes)
    chosen = devices.kernels_for(torch.device(device))
    for name, by_shape in swept.items():
        fastest = min(by_shape, key=by_shape.__getitem__)
        mode = name.removeprefix("gradients ")
        if name.startswith("gradients "):
            is_ours = chosen is not None and mode == chosen.ZERO_GRADIENT_MODE
            row(
                "masking gradients of a step" + (" (ours)" if is_ours else ""), by_shape[fastest], "a copy's 9 bytes a weight",
                9 * model.numel / bandwidth, way=mode, best=fastest,
            )  # fmt: skip
    rows[-1].details["sweep"] = swept
    return rows


def missed_goals(rows: Sequence[Comparison]) -> list[str]:
    """Return a sentence for each goal that is missed."""
    missed = []
    for found in rows:
        details = found.details
        for key, most in (
            ("of_ideal", MOST_OF_IDEAL),
            ("read_passes", MOST_READ_PASSES),
            ("extra_share", MOST_EXTRA_SHARE),
        ):
            if details.get(key, 0) > most:
                missed.append(f"{found.name}: {key} is {details[key]:.3g}, the goal is {most:g}.")
        if found.name.endswith("(ours)") and found.seconds > MOST_MASKING_SECONDS:
            missed.append(
                f"{found.name}: {found.seconds * 1000:.2f} ms, the goal is {MOST_MASKING_SECONDS * 1000:.2f} ms."
            )
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="at a tiny size on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS / "event.json")
    options = parser.parse_args()
    if not options.rehearse:
        if not torch.cuda.is_available():
            parser.error("there is no GPU here: add --rehearse to try the code at a tiny size on a CPU.")
        rows = measure(ONE_B, "cuda", SWEPT)
        write_rows([row.row() for row in rows], options.output)
        finish(missed_goals(rows))
        return
    interpret_kernels("tests.benchmarks.event")
    with mock.patch.object(devices, "_is_gpu", return_value=find_spec("triton") is not None):
        rows = measure(TINY, "cpu", REHEARSED)
    write_rows([row.row() for row in rows], options.output)


if __name__ == "__main__":
    main()
