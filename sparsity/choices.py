"""A user's choices about pruning, and the checks that they can be combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsity.arguments import check_patterns, check_schedule, check_whole
from sparsity.calibration import USUAL_SEQUENCES, check_calibration
from sparsity.factors import check_factors
from sparsity.pattern import UNSTRUCTURED, NofM, Pattern, find_pattern
from sparsity.registry import name_of
from sparsity.schedule import Ramp, Schedule
from sparsity.scope import SCOPES, Group, Scope
from sparsity.score import SCORES, Score, check_score
from sparsity.update import UPDATES, Regrowing, Update


@dataclass
class Choices:
    """The settings of a pruner. Names of methods are replaced by the methods, see `sparsity.registry`.

    Args:
        schedule: The share of weights to keep at each step, see `sparsity.schedule`.
        score: The rule that ranks weights, see `sparsity.score`.
        factors: Name patterns of parameters, with the factors of their scores, see `sparsity.factors`.
        normalize: "l2" or "rms" divides each parameter's scores by their norm of that kind, at each event.
        scope: The rule that says which weights compete with each other, see `sparsity.scope`.
        groups: Parameters with their own targets.
        pattern: The positions that may be pruned, see `sparsity.pattern`.
        update: The rule by which pruned weights may come back, see `sparsity.update`.
        include: Name patterns of the parameters to prune, see `prunable_parameters`.
        requires_dense: Name patterns of parameters that are never pruned.
        seed: The seed of random scores and random growth.
        calibration: How many sequences of the training data give activation norms, for scores that need them.

    Raises:
        ValueError: A name is unknown, or choices cannot be combined.
    """

    schedule: Schedule
    # Names are accepted too; __post_init__ replaces them by the methods.
    score: Score = "magnitude"  # type: ignore[assignment]
    factors: Mapping[str, float] = None  # type: ignore[assignment]
    normalize: str = "none"
    scope: Scope = "global"  # type: ignore[assignment]
    groups: Sequence[Group] = ()
    pattern: Pattern | None = UNSTRUCTURED  # type: ignore[assignment]
    update: Update = "shrink"  # type: ignore[assignment]
    include: Sequence[str] | None = None
    requires_dense: Sequence[str] = ()
    seed: int = 0
    calibration: int = USUAL_SEQUENCES
    events: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        self._check_types()
        self.score = SCORES.find(self.score).seeded(self.seed)
        check_score(self.score)
        self.factors = dict(self.factors or {})
        self.scope = SCOPES.find(self.scope)
        self.pattern = find_pattern(self.pattern)
        self.update = UPDATES.find(self.update)
        self.events = frozenset(self.schedule.events())
        check_factors(self.factors, self.score, self.scope, self.normalize)
        if self.groups and not isinstance(self.schedule, Ramp):
            raise ValueError(
                f"groups need a schedule that can end at their own targets, not {type(self.schedule).__name__}: choose one "
                "of sparsity.schedule, such as Geometric."
            )
        if not self.events:
            self._check_nothing_else_is_chosen()
        check_calibration(self.calibration, self.score)
        if {*self.score.needs} - {"activations"} and 0 in self.events:
            need = "gradient of the step before" if "gradient" in self.score.needs else "optimizer's state"
            raise ValueError(
                f"score={name_of(self.score)} needs the {need}, but the first event is before step 0: start the window at "
                "step 1 or later."
            )
        self.update.check(self.schedule, self.pattern)
        if self.scope.is_by_row and (self.pattern is not None or isinstance(self.update, Regrowing)):
            reason = (
                f"pattern={self.pattern} compares weights by block"
                if self.pattern is not None
                else f"update={self.update.name} grows weights in any row"
            )
            raise ValueError(
                f"{reason}, and scope={name_of(self.scope)} compares the inputs of one neuron: take scope=uniform, or another "
                f"{'pattern' if self.pattern is not None else 'update'}."
            )
        if isinstance(self.pattern, NofM) and not self.scope.is_even:
            raise ValueError(
                f"pattern={self.pattern} takes the same share of every layer, which scope={name_of(self.scope)} does not: "
                "use scope=uniform or global, or pattern=unstructured."
            )
        if self.pattern is not None:
            for sparsity in (1 - self.schedule.density(max(self.events)), *(group.sparsity for group in self.groups)):
                self.pattern.check_sparsity(sparsity)

    def _check_types(self) -> None:
        """Raise a ValueError for an argument of the wrong type that no other check names."""
        if self.include is not None:
            check_patterns("include", self.include)
        check_patterns("requires_dense", self.requires_dense)
        check_whole("seed", self.seed, 0)
        if self.factors is not None and not isinstance(self.factors, Mapping):
            raise ValueError(
                f"factors={self.factors!r} is no mapping: give name patterns and their factors, such as {{'*q_proj*': 0.0625}}."
            )
        if not isinstance(self.groups, Sequence) or not all(isinstance(group, Group) for group in self.groups):
            raise ValueError(
                f"groups={self.groups!r} is no list of groups: give one, such as [Group(include=['*mlp*'], sparsity=0.9)]."
            )

    def _check_nothing_else_is_chosen(self) -> None:
        """Raise a ValueError for a choice that has no effect without events."""
        usual = Choices.__dataclass_fields__
        chosen = {
            "scope": name_of(self.scope),
            "pattern": str(self.pattern or UNSTRUCTURED),
            "score": name_of(self.score),
            "factors": self.factors or None,
            "normalize": self.normalize,
            "update": name_of(self.update),
        }
        for key, value in chosen.items():
            if value != usual[key].default:
                raise ValueError(
                    f"{key}={value} has no effect with {type(self.schedule).__name__}(), which keeps the existing zeros "
                    "and prunes nothing: leave it out, or choose a schedule with events."
                )
