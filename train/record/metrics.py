"""The run's records, written identically to metrics.jsonl and to wandb, one for each logged step."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsity import SparsityCallback
from train.plan.run import RunPlan
from train.speed.throughput import Speedometer, StepClock


class Recorder(TrainerCallback):
    """A callback that writes each log of the Trainer, with tokens, speed and sparsity, to metrics.jsonl and wandb.

    Only rank 0 has one. Keys have the form group/name; wandb makes a section of panels for each group.
    train/tokens_per_second counts all time between two logged steps, and perf/tokens_per_second only the time of training
    steps: `clock` leaves out prune events, evaluation and saving.
    """

    def __init__(
        self,
        plan: RunPlan,
        sparsity: SparsityCallback | None,
        metrics: Path,
        wandb_run: Any | None,
        clock: StepClock,
        speedometer: Speedometer,
        is_wandb_new: bool = False,
    ) -> None:
        self.plan = plan
        self.sparsity = sparsity
        self.clock = clock
        self.speedometer = speedometer
        self.wandb_run = wandb_run
        self.figures_of_data: Callable[[int], dict[str, Any]] = lambda step: {}
        """Returns the tokens and epochs of each source of a mixture after a number of steps."""
        self._earlier = keep_whole_records(metrics)
        if wandb_run is not None and is_wandb_new:
            # A branch has the records of the other run, which its own wandb run does not know yet.
            for number, record in enumerate(self._earlier):
                wandb_run.log(record, step=number, commit=True)
        self._file = open(metrics, "ab", buffering=0)  # noqa: SIM115 - open for as long as the run
        self._unwritten = b""
        self._written = {_identity(record) for record in self._earlier}
        self._last: tuple[int, float] = (0, time.monotonic())
        self._layers: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and take over the layers' densities from the last record before this step."""
        self._last = (state.global_step, time.monotonic())
        self.clock.start()
        for record in self._earlier:
            if record["train/global_step"] <= state.global_step:
                layers = {name: value for name, value in record.items() if name.startswith("layer_density/")}
                self._layers = {name.partition("/")[2]: value for name, value in layers.items()} or self._layers
        self._earlier = []

    def sync(self) -> None:
        """Sync every record so far to the disk, so that a checkpoint is never ahead of its records.

        Raises:
            OSError: The disk has no room.
        """
        self._flush()
        os.fsync(self._file.fileno())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a record of a log that holds a training loss or held-out figures."""
        figures = {name: value for name, value in (logs or {}).items() if not name.startswith("train_")}
        if "loss" in figures or any(name.startswith("eval_") for name in figures):
            self.write(self._record(state.global_step, figures))

    def _record(self, step: int, figures: dict[str, float]) -> dict[str, Any]:
        record: dict[str, Any] = {
            "train/global_step": step,
            "train/tokens": step * self.plan.batch_tokens,
            **{_grouped(name): value for name, value in figures.items()},
        }
        if "loss" in figures:
            before, since = self._last
            self._last = (step, time.monotonic())
            seconds = max(self._last[1] - since, 1e-9)
            num_tokens = (step - before) * self.plan.batch_tokens
            record["train/tokens_per_second"] = num_tokens / seconds
            record |= self.speedometer.figures(num_tokens, self.clock.lap())
            record |= {f"train/{name}": value for name, value in self.figures_of_data(step).items()}
        if self.sparsity is not None:
            record |= self.sparsity.metrics(step - 1)
            layers = self.sparsity.pruner.layer_densities()
            if layers != self._layers:
                self._layers = layers
                record |= {f"layer_density/{name}": density for name, density in layers.items()}
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, unless it was already written before an interruption."""
        if _identity(record) in self._written:
            return
        self._written.add(_identity(record))
        self._unwritten += json.dumps({name: _finite(value) for name, value in record.items()}).encode() + b"\n"
        # If the disk is full, the next checkpoint reports that, on all ranks together.
        with contextlib.suppress(OSError):
            self._flush()
        if self.wandb_run is None:
            return
        if any(name.startswith("layer_density/") for name in record):
            import wandb

            layers = [value for name, value in record.items() if name.startswith("layer_density/")]
            record = {**record, "sparsity/layer_density": wandb.Histogram(layers, num_bins=20)}
        # The step includes records of earlier processes: in offline mode wandb itself would begin at 0 after a resume.
        self.wandb_run.log(record, step=len(self._written) - 1, commit=True)

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        """Write the last records and close the file when the run is interrupted."""
        self._file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=1)

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the records of a finished run and store its summary in wandb."""
        self._flush()
        self._file.close()
        if self.wandb_run is not None:
            self.wandb_run.summary.update(summary)
            self.wandb_run.finish()


def keep_whole_records(metrics: Path) -> list[dict[str, Any]]:
    """Return the records of a file, and remove a last line that was cut off when the run was killed.

    Raises:
        ValueError: Another line is not a record.
    """
    if not metrics.exists():
        return []
    data = metrics.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(metrics, len(whole))
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        assert all("train/global_step" in record for record in records)
    except (ValueError, TypeError, AssertionError):
        raise ValueError(
            f"{metrics} holds a line that is not a record of a run: repair or remove the line, or set overwrite=true to "
            "start the run over."
        ) from None
    return records


def _identity(record: dict[str, Any]) -> tuple[int, str]:
    """Return the key of a record; a step may have one record of training and one of evaluation."""
    return record["train/global_step"], "train" if "train/loss" in record else "eval"


def _finite(value: Any) -> Any:
    """Return None for a number that is not finite, because JSON has no NaN."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _grouped(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class ProgressBar(ProgressCallback):
    """transformers' progress bar with loss and density at its end, instead of a line for each log."""

    def __init__(self, sparsity: SparsityCallback | None) -> None:
        super().__init__()
        self.sparsity = sparsity

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the bar; elsewhere than on a terminal, draw it every 15 seconds at most."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")
            if not sys.stderr.isatty():
                self.training_bar.mininterval = 15.0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the loss and the density at the bar's end."""
        if self.training_bar is not None and "loss" in (logs or {}):
            density = self.sparsity.density if self.sparsity else 1.0
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", density=f"{density:.3f}", refresh=False)
