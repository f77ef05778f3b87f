"""A table of every combination of settings for pruning, and whether it is allowed; all tests of methods use it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from torch import Tensor

from sparsity.callback import SparsityCallback
from sparsity.schedule import Alternating, Constant, Cubic, Fixed, Geometric, Linear, OneShot, Schedule
from sparsity.scope import Group
from sparsity.score import Score
from sparsity.shards import ParameterShard
from sparsity.update import AcDc, Rigl, Set, Shrink, Ste

NUM_STEPS = 6
TARGETS = {"unstructured": 0.8, "2:4": 0.5, "1:4": 0.75}
SCHEDULES = ("geometric", "cubic", "linear", "one_shot", "constant", "fixed")
SCOPES = ("global", "uniform", "erk")
GROUPS = {
    "none": (),
    "dense attention": (Group(("*attn*",), 0.0),),
    "own targets": (Group(("*q_proj*", "*k_proj*"), 0.25), Group(("*mlp*",), 0.9)),
}
SCORES = ("magnitude", "random", "scaled", "own")
"""The scores. `scaled` is magnitude with the factors below, divided by norms; `own` is `Steps`."""
FACTORS = {"*q_proj*": 0.0625, "*down_proj*": 3.0}
UPDATES = {"shrink": Shrink(), "set": Set(0.5, 2, 1), "rigl": Rigl(0.5, 2, 1), "ste": Ste(0.5, 2, 1), "acdc": AcDc()}
"""The updates; masks move before or at steps 2 and 4."""


class Steps(Score):
    """A score of |w| times the first moment, the size of recent updates, plus a little of the column index."""

    needs = ("state",)

    def values(self, shard: ParameterShard, part: slice) -> Tensor:
        column = shard.index(part) % shard.shape[-1]
        return shard.values[part].abs() * shard.state["exp_avg"][part].abs() + 1e-9 * column


@dataclass(frozen=True)
class Method:
    schedule: str
    scope: str
    groups: str
    pattern: str
    score: str
    update: str = "shrink"

    def __str__(self) -> str:
        parts = (self.schedule, self.scope, self.groups, self.pattern, self.score, self.update)
        return "-".join(parts).replace(" ", "_").replace("-shrink", "")

    def target(self, name: str) -> float:
        """Return the final sparsity of the parameter `name` under a uniform scope, or of its group under a global one."""
        return next((g.sparsity for g in GROUPS[self.groups] if g.matches(name)), TARGETS[self.pattern])


METHODS = [
    *(Method(*choice) for choice in product(SCHEDULES, SCOPES, GROUPS, TARGETS, SCORES)),
    *(
        Method(*choice)
        for choice in product(
            ("cubic", "constant", "alternating", "fixed"), SCOPES, ("none", "own targets"), ("unstructured", "2:4"),
            ("magnitude",), list(UPDATES)[1:],
        )
    ),
    Method("alternating", "global", "none", "unstructured", "magnitude"),
    *(Method(*choice, "none", "unstructured", "saliency") for choice in product(("one_shot", "cubic", "constant"), SCOPES)),
]  # fmt: skip


def reason_to_refuse(method: Method) -> str | None:
    """Return a part of the sentence with which a method is refused, or None if it is allowed."""
    if method.score == "scaled" and method.scope != "global":
        return f"factors have no effect with scope={method.scope}"
    if method.schedule == "fixed":
        return _reason_with_fixed_masks(method)
    if method.score == "own" and method.schedule == "constant":
        return "needs the optimizer's state, and the first event is before step 0"
    if method.score == "saliency" and method.schedule == "constant":
        return "needs the gradient of the step before, and the first event is before step 0"
    if (method.schedule == "alternating") != (method.update == "acdc"):
        return "take schedule=alternating" if method.update == "acdc" else "take update=acdc"
    if method.update in ("set", "rigl") and method.pattern != "unstructured":
        return f"update={method.update} grows weights anywhere, which pattern={method.pattern} does not allow"
    if method.pattern != "unstructured" and method.scope == "erk":
        return f"pattern={method.pattern} takes the same share of every layer, which scope=erk does not"
    if method.pattern != "unstructured" and method.groups == "own targets":
        return f"pattern={method.pattern} ends at a sparsity of {TARGETS[method.pattern]}, not 0.25"
    return None


def _reason_with_fixed_masks(method: Method) -> str | None:
    if method.groups != "none":
        return "groups need a schedule that can end at their own targets, not Fixed"
    score = {"scaled": "magnitude", "own": "tests.methods:Steps"}.get(method.score, method.score)
    chosen = (("scope", method.scope), ("pattern", method.pattern), ("score", score))
    for (key, value), default in zip(chosen, ("global", "unstructured", "magnitude"), strict=True):
        if value != default:
            return f"{key}={value} has no effect with Fixed()"
    if method.score == "scaled":
        return f"factors={FACTORS} has no effect with Fixed()"
    return f"update={method.update} has no effect with Fixed()" if method.update != "shrink" else None


ALLOWED = [method for method in METHODS if reason_to_refuse(method) is None]
REFUSED = [method for method in METHODS if reason_to_refuse(method) is not None]


def schedule_of(method: Method) -> Schedule:
    """Return the schedule of a run of NUM_STEPS steps.

    Gradual schedules prune before steps 1, 3 and 5; one-shot prunes before step 4, right after a resume.
    """
    sparsity = TARGETS[method.pattern]
    return {
        "geometric": Geometric(sparsity, 1, 5, 2),
        "cubic": Cubic(sparsity, 1, 5, 2),
        "linear": Linear(sparsity, 1, 5, 2),
        "one_shot": OneShot(sparsity, 4),
        "constant": Constant(sparsity),
        "alternating": Alternating(sparsity, 1, 5, 2),
        "fixed": Fixed(),
    }[method.schedule]


def callback_of(method: Method) -> SparsityCallback:
    callback = SparsityCallback(
        schedule_of(method),
        scope=method.scope,
        groups=GROUPS[method.groups],
        pattern=method.pattern,
        score={"scaled": "magnitude", "own": Steps()}.get(method.score, method.score),
        factors=FACTORS if method.score == "scaled" else None,
        normalize="rms" if method.score == "scaled" else "none",
        update=UPDATES[method.update],
        seed=3,
        report=False,
    )
    callback.rule.prepare(NUM_STEPS)
    return callback
