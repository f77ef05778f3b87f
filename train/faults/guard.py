"""Before each update all ranks agree on two things: whether its numbers are finite, and whether the run is to stop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.distributed import World
from train.faults.preempt import Preemption
from train.faults.stop import PREEMPTED_CODE, RunStopped


class StepGuard(TrainerCallback):
    """Skips updates with a non-finite loss or gradient norm, and ends a run that is asked to stop or is beyond help.

    A skipped step counts: data, learning rate and prune events go on, weights and moments stay. The run stops, with a
    checkpoint, after more than `max_skipped` of them in a row, and after the step in which any rank was preempted.
    """

    def __init__(self, world: World, preemption: Preemption, max_skipped: int) -> None:
        self.world = world
        self.preemption = preemption
        self.max_skipped = max_skipped
        self.num_skipped = 0
        """Skipped updates since the run began."""
        self.num_in_row = 0
        self._is_stop_agreed = False

    def allows_update(self, loss: Tensor, grad_norm: Tensor | float | None) -> bool:
        """Whether the update is made: the same answer on every rank. Collective: one maximum of two flags."""
        values = [loss] if grad_norm is None else [loss, torch.as_tensor(grad_norm)]
        is_bad = any(not torch.isfinite(value).all() for value in values)
        flags = torch.tensor([float(is_bad), float(self.preemption.is_requested)], device=self.world.device)
        is_bad, is_stopped = (bool(flag) for flag in self.world.largest(flags).tolist())
        self._is_stop_agreed |= is_stopped
        self.num_skipped += is_bad
        self.num_in_row = self.num_in_row + 1 if is_bad else 0
        return not is_bad

    @property
    def stop(self) -> RunStopped | None:
        """Why the run ends at this step, None where it goes on."""
        if self.num_in_row > self.max_skipped:
            return RunStopped(
                f"The loss or the gradient norm was not finite in {self.num_in_row} steps in a row, more than "
                f"max_skipped={self.max_skipped}; the checkpoint holds the last good weights: lower "
                "optim.learning_rate, or look at the data of these steps."
            )
        if self._is_stop_agreed:
            return RunStopped(
                "the run was asked to stop and has saved a checkpoint: the same command goes on from it", PREEMPTED_CODE
            )
        return None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop is not None:
            control.should_save = True
            control.should_training_stop = True
