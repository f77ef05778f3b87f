"""Every way to prune that the settings can spell, each with whether it is allowed: one table for all tests of methods."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from sparsity.callback import SparsityCallback
from sparsity.schedule import Constant, Cubic, Fixed, Geometric, Linear, OneShot, Schedule
from sparsity.scope import Group

NUM_STEPS = 6
TARGETS = {"unstructured": 0.8, "2:4": 0.5, "1:4": 0.75}
SCHEDULES = ("geometric", "cubic", "linear", "one_shot", "constant", "fixed")
SCOPES = ("global", "uniform")
GROUPS = {
    "none": (),
    "dense attention": (Group(("*attn*",), 0.0),),
    "own targets": (Group(("*q_proj*", "*k_proj*"), 0.25), Group(("*mlp*",), 0.9)),
}
SCORES = ("magnitude", "random", "scaled")
"""`scaled` is magnitude with the factors below."""
FACTORS = {"*q_proj*": 0.0625, "*down_proj*": 3.0}


@dataclass(frozen=True)
class Method:
    schedule: str
    scope: str
    groups: str
    pattern: str
    score: str

    def __str__(self) -> str:
        return "-".join((self.schedule, self.scope, self.groups, self.pattern, self.score)).replace(" ", "_")

    def target(self, name: str) -> float:
        """The sparsity that the parameter `name` ends with under a uniform scope, and its group under a global one."""
        return next((g.sparsity for g in GROUPS[self.groups] if g.matches(name)), TARGETS[self.pattern])


METHODS = [Method(*choice) for choice in product(SCHEDULES, SCOPES, GROUPS, TARGETS, SCORES)]


def reason_to_refuse(method: Method) -> str | None:
    """Part of the sentence that refuses a method; None for what is allowed."""
    if method.score == "scaled" and method.scope == "uniform":
        return "factors have no effect with scope=uniform"
    if method.schedule == "fixed":
        if method.groups != "none":
            return "groups need a schedule that can end at their own targets, not Fixed"
        score = "magnitude" if method.score == "scaled" else method.score
        chosen = (("scope", method.scope), ("pattern", method.pattern), ("score", score))
        for (key, value), default in zip(chosen, ("global", "unstructured", "magnitude"), strict=True):
            if value != default:
                return f"{key}={value} has no effect with Fixed()"
        return f"factors={FACTORS} has no effect with Fixed()" if method.score == "scaled" else None
    if method.pattern != "unstructured" and method.groups == "own targets":
        return f"pattern={method.pattern} ends at a sparsity of {TARGETS[method.pattern]}, not 0.25"
    return None


ALLOWED = [method for method in METHODS if reason_to_refuse(method) is None]
REFUSED = [method for method in METHODS if reason_to_refuse(method) is not None]


def schedule_of(method: Method) -> Schedule:
    """Of a run of NUM_STEPS steps: gradual ones prune before steps 1, 3 and 5, one-shot before step 2."""
    sparsity = TARGETS[method.pattern]
    return {
        "geometric": Geometric(sparsity, 1, 5, 2),
        "cubic": Cubic(sparsity, 1, 5, 2),
        "linear": Linear(sparsity, 1, 5, 2),
        "one_shot": OneShot(sparsity, 2),
        "constant": Constant(sparsity),
        "fixed": Fixed(),
    }[method.schedule]


def callback_of(method: Method) -> SparsityCallback:
    return SparsityCallback(
        schedule_of(method),
        scope=method.scope,
        groups=GROUPS[method.groups],
        pattern=method.pattern,
        score="magnitude" if method.score == "scaled" else method.score,
        factors=FACTORS if method.score == "scaled" else None,
        seed=3,
        report=False,
    )
