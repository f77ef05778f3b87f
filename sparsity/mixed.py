"""The schedule of all weights together if groups of them have their own targets, and its record. This needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sparsity.registry import name_of
from sparsity.schedule import Ramp
from sparsity.staircase import Staircase


@dataclass(frozen=True)
class Mixed(Staircase):
    """The density of several groups of weights together; each group follows `base` to its own sparsity.

    `shares` holds (share of the prunable weights, sparsity) for each group; the shares add up to 1.
    """

    base: Ramp
    shares: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for name in ("start_step", "end_step", "every_steps"):
            object.__setattr__(self, name, getattr(self.base, name))
        object.__setattr__(self, "sparsity", math.fsum(share * sparsity for share, sparsity in self.shares))

    @property
    def name(self) -> str:
        """The name of `base`."""
        return self.base.name

    @property
    def label(self) -> str:
        """The label of `base`."""
        return self.base.label

    def density_after(self, event: int) -> float:
        """Return the mean density of the groups, weighted by their shares."""
        if event == self.num_events - 1:
            return 1.0 - self.sparsity
        return math.fsum(
            share * self.base.kept_after(sparsity, event, self.num_events) for share, sparsity in self.shares
        )


def schedule_record(schedule: Ramp | Mixed) -> dict[str, Any]:
    """Return the schedule as plain data: its kind and its fields."""
    return {"kind": name_of(schedule), **asdict(schedule)}
