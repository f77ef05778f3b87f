"""The agreement of the ranks before each update: whether its numbers are finite, and whether the run must stop.

On a GPU with a fused optimizer the answer stays on the device during the step. The optimizer's kernel reads it as
`found_inf`, the flag with which a loss scaler makes an optimizer skip an update. The host reads the answer one step later,
when it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.distributed import World
from train.faults.preempt import Preemption
from train.faults.stop import PREEMPTED_CODE, RunStopped


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's own kernel can skip an update: fused Adam on a GPU."""
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    on_gpu = all(param.is_cuda for group in optimizer.param_groups for param in group["params"])
    return is_fused and on_gpu and isinstance(optimizer, torch.optim.Adam)


class _Flags:
    """Two flags on their way from the device to the host."""

    def __init__(self, flags: Tensor) -> None:
        self._event = torch.cuda.Event() if flags.is_cuda else None
        self._values = torch.empty(2, pin_memory=flags.is_cuda)
        self._values.copy_(flags, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[bool, bool]:
        if self._event is not None:
            self._event.synchronize()
        is_bad, is_stopped = self._values.tolist()
        return bool(is_bad), bool(is_stopped)


class StepGuard(TrainerCallback):
    """A callback that skips updates with a non-finite loss or gradient norm, and stops a run when it must.

    A skipped step counts: data, learning rate and prune events advance, but weights and moments stay as they are. The run
    stops with a checkpoint after more than `max_skipped` skips in a row, and after the step in which a rank was preempted.
    If the flags of a step stay on the device, the host reads them, and the run stops, one step later.
    """

    def __init__(self, world: World, preemption: Preemption, max_skipped: int) -> None:
        self.world = world
        self.preemption = preemption
        self.max_skipped = max_skipped
        self.has_save_failed: Callable[[], bool] = lambda: False
        """Returns whether a background checkpoint has failed on this rank. If so, all ranks stop and save, and that save
        raises the error."""
        self.num_skipped = 0
        """The number of updates skipped since the run began."""
        self.num_in_row = 0
        self._is_stop_agreed = False
        self._unread: _Flags | None = None

    def allows_update(self, loss: Tensor, grad_norm: Tensor | float | None) -> bool:
        """Return whether to make the update, the same on every rank.

        Collective: every rank calls it; they exchange two flags.
        """
        is_bad = self._read(_Flags(self._agree(loss, grad_norm)))
        return not is_bad

    def decide_on_device(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor | float | None
    ) -> None:
        """Make a fused optimizer skip its next update if a number is not finite, without a host sync.

        Collective: every rank calls it.

        Args:
            optimizer: The fused optimizer.
            loss: This rank's loss of the step.
            grad_norm: The norm of the gradients, or None.
        """
        self.read_late_flags()
        flags = self._agree(loss, grad_norm)
        # With found_inf=1 the kernel leaves weights, moments and step counts unchanged.
        optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
        self._unread = _Flags(flags)

    def read_late_flags(self) -> None:
        """Read the flags of the last step that was decided on the device; call it before anything is counted or saved."""
        if self._unread is not None:
            self._read(self._unread)
            self._unread = None

    def is_asked_to_stop(self) -> bool:
        """Return whether a rank has been preempted by now; the answer is the same on every rank. Call it between steps.

        Collective: every rank calls it.
        """
        flag = torch.full((1,), float(self.preemption.is_requested), device=self.world.device)
        self._is_stop_agreed |= bool(self.world.largest(flag))
        return self._is_stop_agreed

    def _agree(self, loss: Tensor, grad_norm: Tensor | float | None) -> Tensor:
        """Return two flags on the device, each 0 or 1: a number is not finite on some rank, some rank must stop."""
        device = self.world.device
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        values = [loss] if grad_norm is None else [loss, torch.as_tensor(grad_norm)]
        is_bad = torch.stack([~torch.isfinite(value.detach().to(device)).all() for value in values]).any()
        is_asked = self.preemption.is_requested or self.has_save_failed()
        is_stopped = torch.full((), float(is_asked), device=device)
        return self.world.largest(torch.stack([is_bad.float(), is_stopped]))

    def _read(self, flags: _Flags) -> bool:
        is_bad, is_stopped = flags.read()
        self._is_stop_agreed |= is_stopped
        self.num_skipped += is_bad
        self.num_in_row = self.num_in_row + 1 if is_bad else 0
        return is_bad

    @property
    def stop(self) -> RunStopped | None:
        """The reason to stop at this step; None if the run continues."""
        if self.num_in_row > self.max_skipped:
            return RunStopped(
                f"The loss or the gradient norm was not finite in {self.num_in_row} steps in a row, more than "
                f"max_skipped={self.max_skipped}; the checkpoint holds the last good weights: lower optim.learning_rate, "
                "or check the data of these steps."
            )
        if self._is_stop_agreed:
            return RunStopped(
                "the run was asked to stop and has saved a checkpoint: rerun the same command to resume from it",
                PREEMPTED_CODE,
            )
        return None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop if the run must end, or if the ranks agree that it was asked to."""
        if state.global_step >= state.max_steps:
            # There is no later step that would read them.
            self.read_late_flags()
        if self.stop is not None:
            control.should_save = True
            control.should_training_stop = True
