"""The group `sparsity`: how many weights are pruned, when, and by which rules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from conf.schema.checks import MAX_STEPS, check, check_choice
from sparsity.calibration import USUAL_SEQUENCES, check_calibration
from sparsity.factors import check_factors
from sparsity.pattern import parse_pattern
from sparsity.schedule import SCHEDULES
from sparsity.scope import SCOPES
from sparsity.score import SCORES
from sparsity.update import UPDATES, Moving, Update


@dataclass
class WindowConfig:
    """The prune window: its first and its last event, in steps, tokens, or shares of the run's compute."""

    start: float = 0.25
    """The first event, in the unit `of`."""
    end: float = 0.75
    """The last event, in the unit `of`."""
    every: int | None = None
    """Steps between events; null derives it from the length of the window (100 for long runs)."""
    of: str = "auto"
    """Unit of start and end; `auto` reads two numbers up to 1 as shares of compute, and larger ones as steps."""
    budget: float | None = None
    """Compute of the run in dense-equivalent steps, which sets its length; trainer.max_steps is then null."""

    def __post_init__(self) -> None:
        check_choice("sparsity.window.of", self.of, ("auto", "steps", "tokens", "compute"))
        check(
            self.every is None or self.every >= 1,
            f"sparsity.window.every={self.every} must be at least 1 step: set it to null to derive it from the window.",
        )
        check(
            self.budget is None or 1 <= self.budget <= MAX_STEPS,
            f"sparsity.window.budget={self.budget} must be from 1 to {MAX_STEPS:,} dense-equivalent steps.",
        )
        check(
            self.budget is None or (self.of in ("auto", "compute") and max(self.start, self.end) <= 1),
            f"sparsity.window.budget={self.budget} needs a window in shares of compute, not from {self.start:g} to "
            f"{self.end:g} in {self.of}: give start and end between 0 and 1 with of=compute, or budget=null.",
        )


@dataclass
class GroupConfig:
    """A group of parameters with its own target."""

    include: list[str] = field(default_factory=list)
    """Name patterns (`*` matches anything). Each must match a prunable parameter, and groups may not overlap."""
    target: float = 0.0
    """Share of the group's weights to remove."""

    def __post_init__(self) -> None:
        check(len(self.include) > 0, "sparsity.groups needs patterns in each group: {include: ['*mlp*'], target: 0.9}.")
        check(
            0 <= self.target < 1,
            f"sparsity.groups gives {', '.join(self.include)} the target {self.target}, outside [0, 1): give the share of "
            "weights to remove, 0.8 for 80 %.",
        )


@dataclass
class MovesConfig:
    """Moves of the masks, for updates that let weights return: set, rigl, ste."""

    share: float = 0.3
    """Share of the kept weights that set and rigl replace at the first move; it falls to 0 by a cosine."""
    every: int | None = None
    """Steps between moves; null: a fortieth of the run, at most 100."""
    end: float = 0.75
    """Share of the run's steps after which the masks no longer change."""


@dataclass
class SparsityConfig:
    """The number of weights to prune, the window, and the rules that choose them."""

    METHODS: ClassVar = {"schedule": SCHEDULES, "score": SCORES, "scope": SCOPES, "update": UPDATES}
    """The registries from which help lists the choices."""

    target: float = 0.0
    """Share of the prunable weights to remove, 0.8 for 80 %."""
    schedule: str = "geometric"
    """Curve of the density inside the window."""
    window: WindowConfig = field(default_factory=WindowConfig)
    score: str = "magnitude"
    """The rule that ranks weights."""
    factors: dict[str, float] = field(default_factory=dict)
    """Name patterns of parameters and the factors of their scores, such as {'*q_proj*': 0.0625}."""
    normalize: str = "none"
    """Norm by which each parameter's scores are divided: none, l2 or rms."""
    scope: str = "global"
    """Rule that says which weights compete under one threshold."""
    groups: list[GroupConfig] = field(default_factory=list)
    """Groups of parameters with their own targets; all other parameters follow `target`."""
    pattern: str = "unstructured"
    """Positions that may be pruned: `unstructured` for any; N:M, "2:4" keeps 2 of every 4 consecutive inputs; RxC, 4x1
    prunes blocks of 4 outputs x 1 input."""
    update: str = "shrink"
    """Rule by which pruned weights may come back."""
    moves: MovesConfig = field(default_factory=MovesConfig)
    calibration: int = USUAL_SEQUENCES
    """Sequences of the training text that give activation norms at each event, for score=wanda."""
    include: list[str] | None = None
    """Name patterns (`*` matches anything) of the parameters to prune; null takes every linear layer's weight."""
    requires_dense: list[str] = field(default_factory=list)
    """Name patterns of parameters that are never pruned."""

    def __post_init__(self) -> None:
        check(
            0 <= self.target < 1,
            f"sparsity.target={self.target} is outside [0, 1): give the share of weights to remove, 0.8 for 80 %.",
        )
        score = SCORES.find(self.score, "sparsity.score")
        scope = SCOPES.find(self.scope, "sparsity.scope")
        check_factors(self.factors, score, scope, self.normalize)
        check_calibration(self.calibration, score)
        SCHEDULES.find(self.schedule, "sparsity.schedule")
        parse_pattern(self.pattern)
        self.make_update()
        window = self.window
        check(
            self.schedule != "one_shot" or window.start == window.end,
            f"sparsity.schedule=one_shot prunes once, but the window goes from {window.start:g} to {window.end:g}: use "
            "sparsity=one_shot, or set sparsity.window.end to its start.",
        )
        check(
            self.schedule != "constant" or window.start == window.end == 0,
            f"sparsity.schedule=constant is sparse from step 0, but the window goes from {window.start:g} to "
            f"{window.end:g}: use sparsity=constant, or set sparsity.window.start and end to 0.",
        )
        check(
            self.schedule not in ("one_shot", "constant") or window.every is None,
            f"sparsity.window.every={window.every} has no effect with sparsity.schedule={self.schedule}, which prunes once: "
            "leave it null.",
        )

    def make_update(self) -> Update:
        """Return the update with the settings of `moves`; raise a ValueError if they are invalid."""
        update, moves = UPDATES.find(self.update, "sparsity.update"), self.moves
        if isinstance(update, Moving):
            return replace(update, share=moves.share, every_steps=moves.every, end=moves.end)
        for key, value in (("share", moves.share), ("every", moves.every), ("end", moves.end)):
            usual = getattr(MovesConfig, key)
            check(
                value == usual,
                f"sparsity.moves.{key}={value} has no effect with sparsity.update={self.update}, whose masks do not move: "
                f"leave it at {'null' if usual is None else usual}, or use update=set, rigl or ste.",
            )
        return update
