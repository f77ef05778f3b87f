"""The training loss of every step, kept on the device until it is needed and saved in checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from train.distributed import World


class StepLosses:
    """The loss of each step [num_steps, float64]: first this rank's own, and after `averaged` the mean over the ranks.

    The sum of a few float32 losses is exact in float64. So a mean depends neither on when it is taken nor on the order of
    the ranks, and a resumed run logs the same numbers to the last bit.
    """

    def __init__(self, num_steps: int, world: World) -> None:
        self._values = torch.zeros(num_steps, dtype=torch.float64, device=world.device)
        self._world = world
        self._num_averaged = 0

    def add(self, step: int, loss: Tensor) -> None:
        """Add a micro-batch's part of the loss of `step`."""
        self._values[step] += loss

    def averaged(self, num_steps: int) -> Tensor:
        """Return the losses of the first `num_steps` steps, averaged over all ranks.

        Collective: every rank calls it.
        """
        if num_steps > self._num_averaged:
            fresh = self._values[self._num_averaged : num_steps]
            fresh.copy_(self._world.mean(fresh.clone()))
            self._num_averaged = num_steps
        return self._values[:num_steps]

    def latest(self, step: int) -> Tensor:
        """Return this rank's own loss of a step that is not averaged yet."""
        return self._values[step]

    def load(self, averaged: Tensor) -> None:
        """Continue from the losses of a checkpoint."""
        self._values.zero_()
        self._values[: len(averaged)] = averaged.to(self._values)
        self._num_averaged = len(averaged)
