"""The rule of the straight-through estimator: masked weights are trained too, and masks are chosen again and again."""

from __future__ import annotations

from typing import Any

from sparsity.pruner import Pruner
from sparsity.rules.latent import LatentWeights
from sparsity.rules.rule import Rule


class StraightThroughRule(Rule):
    """Masks that are chosen again at events and moves; all weights are trained, and the model computes with masked ones."""

    masks_gradients = False

    def __init__(self, pruner: Pruner) -> None:
        super().__init__(pruner)
        self._latent = LatentWeights()

    def acts_before(self, step: int) -> bool:
        """Return whether `step` has an event or a move; both choose the masks anew."""
        return step in self.pruner.events or step in self.moves

    def act(self, step: int, optimizer: Any) -> None:
        """Choose the masks among all weights by their latent values."""
        pruner = self.pruner
        counts = pruner.scheduled(step)
        self._latent.put_back(pruner.parameters, pruner.shards, optimizer)
        pruner.restore_all()
        # The optimizer's states are not zeroed, because masked weights are still trained.
        pruner.prune_to(counts, before_zeroing=lambda: self._latent.take(pruner.parameters, pruner.shards, optimizer))

    def before_update(self, optimizer: Any) -> None:
        """Put the masked weights back, so that the optimizer updates them too."""
        if self.pruner.density < 1:
            self._latent.put_back(self.pruner.parameters, self.pruner.shards, optimizer)

    def after_update(self, optimizer: Any) -> None:
        """Store the masked weights' new values and write 0 into the model."""
        self._keep_gradients(optimizer)
        if self.pruner.density < 1:
            self._latent.take(self.pruner.parameters, self.pruner.shards, optimizer)

    def check_restored(self, optimizer: Any) -> None:
        """Raise a ValueError if the checkpoint has no values of the masked weights."""
        if self.pruner.density < 1:
            self._latent.check_restored(self.pruner.parameters, optimizer)
