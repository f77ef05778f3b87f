"""The rule of AC/DC: all weights return in dense phases."""

from __future__ import annotations

from typing import Any

from sparsity.rules.rule import Rule


class AlternatingRule(Rule):
    """Masks that are removed at events that begin a dense phase and chosen again at the next event."""

    def act(self, step: int, optimizer: Any) -> None:
        """Prune before a sparse phase; unmask all weights, at 0, before a dense one."""
        if any(self.pruner.scheduled(step)):
            super().act(step, optimizer)
        else:
            self.pruner.restore_all()
            self.pruner.masks_changed(optimizer)
