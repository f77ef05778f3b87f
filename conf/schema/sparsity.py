"""The group `sparsity`: how much is pruned, when, and what."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.checks import check, check_choice


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
class SparsityConfig:
    """How much is pruned, when, and what."""

    target: float = 0.0
    window: WindowConfig = field(default_factory=WindowConfig)
    score: str = "magnitude"
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
