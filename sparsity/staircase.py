"""A density that falls in steps at equally spaced events: what all schedules with events share. This needs no torch."""

from __future__ import annotations

import math


class Staircase:
    """Density falls at start_step, start_step + every_steps, ..., end_step, each time before that step runs."""

    start_step: int
    end_step: int
    every_steps: int
    sparsity: float
    """The share of the prunable weights that is pruned after the last event."""

    def density_after(self, event: int) -> float:
        """Return the share of the prunable weights kept after event number `event`, counted from 0."""
        raise NotImplementedError

    @property
    def num_events(self) -> int:
        """The number of events, the first and the last included."""
        return (self.end_step - self.start_step) // self.every_steps + 1

    def events(self) -> range:
        """Return the steps before which weights are pruned."""
        return range(self.start_step, self.end_step + 1, self.every_steps)

    def density(self, step: int) -> float:
        """Return the share of the prunable weights kept while `step` runs, in (0, 1]."""
        if step < self.start_step:
            return 1.0
        return self.density_after(min((step - self.start_step) // self.every_steps, self.num_events - 1))

    def average_density(self, num_steps: int) -> float:
        """Return the mean of density(step) over steps 0 .. num_steps - 1."""
        return self.dense_equivalent_steps(num_steps) / num_steps

    def dense_equivalent_steps(self, num_steps: int) -> float:
        """Return the sum of density(step) over steps 0 .. num_steps - 1: the run's compute in steps of the dense model.

        Raises:
            ValueError: `num_steps` is below 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be at least 1.")
        edges = [0, *self.events(), num_steps]
        densities = [1.0, *(self.density_after(event) for event in range(self.num_events))]
        return math.fsum(
            density * max(0, min(edges[i + 1], num_steps) - edges[i]) for i, density in enumerate(densities)
        )

    def check_fits(self, num_steps: int) -> None:
        """Raise a ValueError if the run is too short for the last event."""
        if self.end_step > num_steps - 1:
            raise ValueError(
                f"The prune window ends at step {self.end_step}, outside a run of {num_steps} steps: its last event must "
                f"come before step {num_steps - 1} trains; end the window earlier or train longer."
            )
