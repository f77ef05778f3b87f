"""A pruner during a run: its figures, and the mean density over the steps so far."""

from __future__ import annotations

from typing import Any

from sparsity.pruner import Pruner
from sparsity.resume import mask_state
from sparsity.schedule import Schedule
from sparsity.shards import ParameterShard


class TrackedPruner:
    """A pruner with its mean density over the steps that have run.

    Args:
        pruner: The masks of the model.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self._density_sum = 0.0
        self._num_steps = 0

    @property
    def schedule(self) -> Schedule:
        """The schedule that the pruner was given."""
        return self.pruner.schedule

    @property
    def shards(self) -> list[ParameterShard]:
        """The pruner's shards with their masks, once training has begun."""
        return self.pruner.shards

    @property
    def kept(self) -> dict[str, int]:
        """The number of kept weights of each prunable parameter, over all ranks."""
        return self.pruner.kept

    @property
    def num_prunable(self) -> int:
        """The number of weights of all prunable parameters."""
        return self.pruner.num_prunable

    @property
    def threshold(self) -> float | None:
        """The pruner's threshold."""
        return self.pruner.threshold

    @property
    def density(self) -> float:
        """The share of the prunable weights that is kept now."""
        return self.pruner.density

    @property
    def average_density(self) -> float:
        """The mean density over the steps run so far."""
        return self._density_sum / self._num_steps if self._num_steps else 1.0

    def metrics(self, step: int) -> dict[str, float]:
        """Return the figures to log after `step` has run."""
        figures = {
            "sparsity/density": self.density,
            "sparsity/target_density": self.pruner.target_density(step),
            "sparsity/average_density": self.average_density,
            "sparsity/nonzero_linear_params": float(sum(self.kept.values())),
        }
        return figures if self.threshold is None else {**figures, "sparsity/threshold": self.threshold}

    def state(self) -> dict[str, Any]:
        """Return the state to save besides the masks of `shards`: plain numbers, the same on every rank."""
        return {"density_sum": self._density_sum, "num_steps": self._num_steps, **mask_state(self.pruner)}
