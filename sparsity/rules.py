"""Rules that change masks in a training step, one for each update of `sparsity.update`; the callback calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsity.gradients import STATE as GRADIENT_STATE
from sparsity.gradients import DenseGradients
from sparsity.latent import LatentWeights
from sparsity.mask import state_holder
from sparsity.moves import GRADIENT, move_
from sparsity.pruner import Pruner
from sparsity.score import Random
from sparsity.shards import ParameterShard, local_values
from sparsity.update import AcDc, Regrowing, Ste


class Rule:
    """Masks that only shrink, at the schedule's events. Other rules extend it."""

    masks_gradients = True
    """Whether gradients of pruned weights are set to 0."""

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


class RegrowRule(Rule):
    """Masks that drop the lowest kept weights and grow the same number of others, at random or by a step's gradients."""

    update: Regrowing

    @property
    def _by_gradient(self) -> bool:
        return self.update.grows_by == "gradient"

    def acts_before(self, step: int) -> bool:
        return super().acts_before(step) or (step in self.moves and not self._by_gradient)

    def act(self, step: int, optimizer: Any) -> None:
        if step in self.pruner.events:
            super().act(step, optimizer)
        if step in self.moves and not self._by_gradient:
            self._move(step, optimizer)

    def moves_after_backward(self, step: int) -> bool:
        return self._by_gradient and step in self.moves

    def move(self, step: int, optimizer: Any) -> None:
        self._move(step, optimizer)

    def _move(self, step: int, optimizer: Any) -> None:
        pruner, share = self.pruner, self.update.share_at(step, self.num_steps)
        pruner.refresh()
        grow_by = GRADIENT if self._by_gradient else Random(f"{pruner.choices.seed}:{step}")
        with pruner.event_score(optimizer) as drop_by:
            for pool in pruner.pools:
                shards = pruner.shards_of(pool)
                gradients = None
                if self._by_gradient:
                    assert self._gradients is not None
                    gradients = {s.name: self._gradients.of(s, pruner.parameters[s.name]) for s in shards}
                move_(
                    shards,
                    int(share * (pool.numel - pruner.num_pruned(pool))),
                    drop_by=drop_by,
                    grow_by=grow_by,
                    gradients=gradients,
                    layout=pruner.layout,
                )
        pruner.masks_changed(optimizer)


class StraightThroughRule(Rule):
    """Masks that are chosen again at events and moves; all weights are trained, and the model computes with masked ones."""

    masks_gradients = False

    def __init__(self, pruner: Pruner) -> None:
        super().__init__(pruner)
        self._latent = LatentWeights()

    def acts_before(self, step: int) -> bool:
        return step in self.pruner.events or step in self.moves

    def act(self, step: int, optimizer: Any) -> None:
        pruner = self.pruner
        counts = pruner.scheduled(step)
        self._latent.put_back(pruner.parameters, pruner.shards, optimizer)
        pruner.restore_all()
        # The optimizer's states are not zeroed, because masked weights are still trained.
        pruner.prune_to(counts, before_zeroing=lambda: self._latent.take(pruner.parameters, pruner.shards, optimizer))

    def before_update(self, optimizer: Any) -> None:
        if self.pruner.density < 1:
            self._latent.put_back(self.pruner.parameters, self.pruner.shards, optimizer)

    def after_update(self, optimizer: Any) -> None:
        self._keep_gradients(optimizer)
        if self.pruner.density < 1:
            self._latent.take(self.pruner.parameters, self.pruner.shards, optimizer)

    def check_restored(self, optimizer: Any) -> None:
        if self.pruner.density < 1:
            self._latent.check_restored(self.pruner.parameters, optimizer)


class AlternatingRule(Rule):
    """Masks that are removed at events that begin a dense phase and chosen again at the next event."""

    def act(self, step: int, optimizer: Any) -> None:
        if any(self.pruner.scheduled(step)):
            super().act(step, optimizer)
        else:
            self.pruner.restore_all()
            self.pruner.masks_changed(optimizer)


def rule_for(pruner: Pruner) -> Rule:
    """Return the rule of a pruner's update."""
    update = pruner.choices.update
    if isinstance(update, Regrowing):
        return RegrowRule(pruner)
    if isinstance(update, Ste):
        return StraightThroughRule(pruner)
    return AlternatingRule(pruner) if isinstance(update, AcDc) else Rule(pruner)
