"""The rule by which masks change in a training step if pruned weights never come back; other rules extend it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsity.event.gradients import STATE as GRADIENT_STATE
from sparsity.event.gradients import DenseGradients
from sparsity.mask import state_holder
from sparsity.pruner import Pruner
from sparsity.shards import ParameterShard, local_values


class Rule:
    """Masks that only shrink, at the schedule's events. Other rules extend it."""

    masks_gradients = True
    """True if gradients of pruned weights are set to 0."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.update = pruner.choices.update
        self.num_steps = 0
        self.moves: frozenset[int] = frozenset()
        """The steps at which masks move in addition to the schedule's events."""
        self._gradients: DenseGradients | None = None
        self._event_needs_them = False

    def prepare(self, num_steps: int) -> None:
        """Set the length of the run, which decides when masks move."""
        self.num_steps = num_steps
        self.moves = self.update.moves(self.pruner.schedule, num_steps)

    def acts_before(self, step: int) -> bool:
        """Return whether masks change before `step` runs."""
        return step in self.pruner.events

    def act(self, step: int, optimizer: Any) -> None:
        """Change masks before `step` runs.

        Collective: over all ranks.
        """
        self.pruner.prune_at(step, optimizer)

    def chooses_at(self, step: int) -> bool:
        """Return whether scores rank weights before `step` trains or by its gradients."""
        return self.acts_before(step) or self.moves_after_backward(step)

    def begin_step(self, step: int) -> None:
        """Start to collect the dense gradients of `step` if a move in it or the event after it needs them."""
        pruner = self.pruner
        self._event_needs_them = "gradient" in pruner.choices.score.needs and step + 1 in pruner.events
        collects = self._event_needs_them or self.moves_after_backward(step)
        self._gradients = DenseGradients(self.masks_gradients) if collects else None
        pruner.on_gradient = self._see if collects or not self.masks_gradients else None

    def _see(self, shard: ParameterShard, gradient: Tensor) -> bool:
        if self._gradients is not None:
            self._gradients.add(shard, gradient)
        return self.masks_gradients

    def moves_after_backward(self, step: int) -> bool:
        """Return whether masks move by the gradients of `step`; such a step updates no weights."""
        return False

    def move(self, step: int, optimizer: Any) -> None:
        """Move masks by the gradients of `step`.

        Collective: over all ranks.
        """

    def before_update(self, optimizer: Any) -> None:
        """Act between the backward pass and the optimizer's update."""

    def after_update(self, optimizer: Any) -> None:
        """Zero the pruned weights again, because the optimizer's update may have changed them."""
        self._keep_gradients(optimizer)
        self.pruner.after_update(optimizer)

    def _keep_gradients(self, optimizer: Any) -> None:
        """Store the dense gradients for the next event as optimizer state, so that checkpoints save them."""
        if self._event_needs_them and self._gradients is not None:
            for (_, param), shard in zip(self.pruner.parameters.items(), self.pruner.shards, strict=True):
                kept = torch.zeros_like(param.detach(), dtype=torch.float32)
                local_values(kept).copy_(self._gradients.of(shard, param))
                state_holder(optimizer).state[param][GRADIENT_STATE] = kept
            self._gradients = None

    def check_restored(self, optimizer: Any) -> None:
        """Raise a ValueError if a resumed run lacks what the rule needs."""
