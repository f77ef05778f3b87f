"""The group `sparsity`: how much is pruned, when, and what."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.checks import check, check_choice
from sparsity.factors import check_factors
from sparsity.pattern import parse_pattern
from sparsity.schedule import SCHEDULES


@dataclass
class WindowConfig:
    """When weights are pruned: the first and the last event, in steps, tokens, or shares of the run's compute."""

    start: float = 0.25
    end: float = 0.75
    every: int | None = None
    """Steps between events; where it is null it follows the length of the window (100 for long runs)."""
    of: str = "auto"
    """Unit of start and end; `auto` reads two numbers up to 1 as shares of compute, larger ones as steps."""
    budget: float | None = None
    """Compute of the run in dense-equivalent steps: its length follows from it, and trainer.max_steps is null."""

    def __post_init__(self) -> None:
        check_choice("sparsity.window.of", self.of, ("auto", "steps", "tokens", "compute"))
        check(
            self.every is None or self.every >= 1,
            f"sparsity.window.every={self.every} must be at least 1 step: leave it null and it follows the window.",
        )
        check(
            self.budget is None or self.budget >= 1,
            f"sparsity.window.budget={self.budget} must be at least 1 dense-equivalent step.",
        )
        check(
            self.budget is None or (self.of in ("auto", "compute") and max(self.start, self.end) <= 1),
            f"sparsity.window.budget={self.budget} needs a window in shares of compute, not from {self.start:g} to "
            f"{self.end:g} in {self.of}: give start and end between 0 and 1 with of=compute, or budget=null.",
        )


@dataclass
class GroupConfig:
    """Parameters with a target of their own."""

    include: list[str] = field(default_factory=list)
    """Name patterns (`*` matches anything); each must match a parameter that is pruned, and no other group may."""
    target: float = 0.0

    def __post_init__(self) -> None:
        check(len(self.include) > 0, "sparsity.groups needs patterns in each group: {include: ['*mlp*'], target: 0.9}.")
        check(
            0 <= self.target < 1,
            f"sparsity.groups gives {', '.join(self.include)} the target {self.target}, outside [0, 1): give the share of "
            "weights to remove, 0.8 for 80 %.",
        )


@dataclass
class SparsityConfig:
    """How much is pruned, when, and what."""

    target: float = 0.0
    schedule: str = "geometric"
    """How the density falls inside the window: geometric, cubic, linear, one_shot, or constant from the start."""
    window: WindowConfig = field(default_factory=WindowConfig)
    score: str = "magnitude"
    """What ranks a weight: its magnitude, or random as the control."""
    factors: dict[str, float] = field(default_factory=dict)
    """Name patterns of parameters and what their scores are multiplied by, such as {'*q_proj*': 0.0625}."""
    scope: str = "global"
    """Which weights compete: all (one threshold), or those of each parameter (uniform: every layer to the target)."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Parameters with targets of their own; what no group names follows `target`."""
    pattern: str = "unstructured"
    """Where weights may go: anywhere, or N:M, "2:4": 2 of every 4 consecutive inputs stay."""
    include: list[str] | None = None
    """Name patterns (`*` matches anything) of the parameters to prune; every linear layer's weight where it is null."""
    requires_dense: list[str] = field(default_factory=list)
    """Name patterns of parameters that are never pruned."""

    def __post_init__(self) -> None:
        check(
            0 <= self.target < 1,
            f"sparsity.target={self.target} is outside [0, 1): give the share of weights to remove, 0.8 for 80 %.",
        )
        check_choice("sparsity.score", self.score, ("magnitude", "random"))
        check_choice("sparsity.scope", self.scope, ("global", "uniform"))
        check_factors(self.factors, self.score, self.scope)
        check_choice("sparsity.schedule", self.schedule, tuple(SCHEDULES))
        parse_pattern(self.pattern)
        window = self.window
        check(
            self.schedule != "one_shot" or window.start == window.end,
            f"sparsity.schedule=one_shot prunes once, and the window goes from {window.start:g} to {window.end:g}: take "
            "sparsity=one_shot, or set sparsity.window.end to its start.",
        )
        check(
            self.schedule != "constant" or window.start == window.end == 0,
            f"sparsity.schedule=constant is sparse from step 0, and the window goes from {window.start:g} to "
            f"{window.end:g}: take sparsity=constant, or set sparsity.window.start and end to 0.",
        )
        check(
            self.schedule not in ("one_shot", "constant") or window.every is None,
            f"sparsity.window.every={window.every} has no effect with sparsity.schedule={self.schedule}, which prunes once: "
            "leave it null.",
        )
