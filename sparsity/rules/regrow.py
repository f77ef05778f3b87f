"""The rule of SET and RigL: masks drop weights and grow others, in addition to the schedule's events."""

from __future__ import annotations

from typing import Any

from sparsity.rules.moves import GRADIENT, move_
from sparsity.rules.rule import Rule
from sparsity.score import Random
from sparsity.update import Regrowing


class RegrowRule(Rule):
    """Masks that drop the lowest kept weights and grow the same number of others, at random or by a step's gradients."""

    update: Regrowing

    @property
    def _by_gradient(self) -> bool:
        return self.update.grows_by == "gradient"

    def acts_before(self, step: int) -> bool:
        """Return whether `step` has an event or a random move; a move by gradients is made after its backward pass."""
        return super().acts_before(step) or (step in self.moves and not self._by_gradient)

    def act(self, step: int, optimizer: Any) -> None:
        """Run the event before `step`, then its random move."""
        if step in self.pruner.events:
            super().act(step, optimizer)
        if step in self.moves and not self._by_gradient:
            self._move(step, optimizer)

    def moves_after_backward(self, step: int) -> bool:
        """Return whether `step` has a move and growth is by gradients."""
        return self._by_gradient and step in self.moves

    def move(self, step: int, optimizer: Any) -> None:
        """Drop and grow weights by the gradients of `step`."""
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
