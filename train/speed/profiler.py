"""Profiles of some steps, written to the run's folder: torch's trace, the slowest kernels, and on a GPU its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.speed.throughput import StepClock

MAX_MEMORY_EVENTS = 100_000
NUM_KERNELS = 20


class StepProfiler(TrainerCallback):
    """A callback that profiles the steps `first` to `last`, numbered as in metrics.jsonl; only rank 0 has one.

    Profiled steps are slower than others, and writing a profile waits for the device. A resumed run profiles only steps
    that it runs itself. If a profile cannot be written, the run warns and continues. The profiler comes before the
    sparsity callback, so that prune events are in the trace.

    Args:
        first: The first step.
        last: The last step.
        folder: The folder for `steps-FIRST-LAST.trace.json.gz` (for https://ui.perfetto.dev),
            `steps-FIRST-LAST.kernels.txt`, and on a GPU `steps-FIRST-LAST.memory.pickle` (for
            https://docs.pytorch.org/memory_viz).
        clock: The run's clock, which is paused while the files are written.
    """

    def __init__(self, first: int, last: int, folder: Path, clock: StepClock) -> None:
        self.first = first
        self.last = last
        self.folder = folder
        self.clock = clock
        self._profile: profile | None = None
        self._begun = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the profile before the first step that is asked for."""
        step = state.global_step + 1
        if self._profile is None and self.first <= step <= self.last:
            self._begun = step
            self._profile = start_profile()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the profile after the last step that is asked for."""
        if state.global_step >= self.last:
            self._write(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the profile of a run that ends before the last step."""
        self._write(state.global_step)

    def _write(self, step: int) -> None:
        """Write the profile that ends with `step`, if there is one."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        with self.clock.pause():
            try:
                write_profile(found, self.folder, f"steps-{self._begun}-{step}")
            except OSError as error:
                print(f"warning: the profile could not be written: {error}.", file=sys.stderr, flush=True)


def start_profile() -> profile:
    """Start a profiler of this process and return it; if there is a GPU, its kernels and memory are recorded too."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=MAX_MEMORY_EVENTS)
    found = profile(activities=activities, record_shapes=True)
    found.start()
    return found


def write_profile(found: profile, folder: Path, name: str) -> None:
    """Stop a profiler and write its files to `folder`, under names that begin with `name`."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.synchronize()
    found.stop()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if has_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
    finally:
        if has_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    (folder / f"{name}.kernels.txt").write_text(kernel_table(found), encoding="utf-8")
    found.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))


def kernel_table(found: profile, num_rows: int = NUM_KERNELS) -> str:
    """Return a table of the operations that take the most time themselves, on the GPU if there is one."""
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=num_rows) + "\n"
