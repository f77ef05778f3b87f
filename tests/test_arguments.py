"""Arguments of the wrong type, given to the public constructors of `sparsity`, are refused at once in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from torch import nn

from sparsity import (
    AcDc,
    Constant,
    Cubic,
    Fixed,
    Geometric,
    Group,
    OneShot,
    Pruner,
    Ramp,
    Rigl,
    Scope,
    Score,
    Set,
    SparsityCallback,
    Ste,
    prunable_parameters,
)
from sparsity.pattern import Blocks, NofM
from sparsity.schedule import Alternating
from sparsity.scope import Uniform
from sparsity.score import Magnitude, Random

USUAL = Geometric(0.5, 0, 200, 100)


class Blind(Score):
    """A score that forgets to say how it ranks."""


class Greedy(Magnitude):
    needs = ("activation",)


class Flat(Ramp):
    """A schedule that forgets its curve."""


class Early(Cubic):
    def events(self) -> Any:
        return [0.5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        # --- schedules ---
        (lambda: Geometric(80, 0, 200, 100), "sparsity=80 is outside [0, 1): give the share of weights to remove, 0.8 for"),
        (lambda: Geometric("0.8", 0, 200, 100), "sparsity='0.8' is not a number: give one, such as 0.8."),
        (lambda: Geometric(float("nan"), 0, 200, 100), "sparsity=nan is outside [0, 1)"),
        (lambda: Geometric(True, 0, 200, 100), "sparsity=True is not a number"),
        (lambda: Geometric(0.8, 0, 200, "100"), "every_steps='100' is not a whole number: give one, such as 100."),
        (lambda: Cubic(0.8, 0.0, 200, 100), "start_step=0.0 is not a whole number: give one, such as 0."),
        (lambda: Cubic(0.8, 0, None, 100), "end_step=None is not a whole number: give one, such as 1000."),
        (lambda: OneShot(0.8, [3]), "start_step=[3] is not a whole number"),
        (lambda: Constant(None), "sparsity=None is not a number"),
        (lambda: Alternating(0.5, 0, 20, True), "every_steps=True is not a whole number"),
        (lambda: Ramp(0.5, 0, 200, 100), "Ramp has no curve: take Geometric"),
        (lambda: Flat(0.5, 0, 200, 100), "Flat has no curve"),
        (lambda: SparsityCallback({"sparsity": 0.8}), "schedule={'sparsity': 0.8} is no schedule: give an instance"),
        (lambda: SparsityCallback(Geometric), "schedule=Geometric is a class: give an instance"),
        (lambda: SparsityCallback("geometric"), "schedule='geometric' is no schedule: give an instance"),
        (lambda: SparsityCallback(None), "schedule=None is no schedule"),
        (lambda: SparsityCallback(Early(0.5, 0, 2, 1)), "an event of schedule Early=0.5 is not a whole number"),
        # --- the methods ---
        (lambda: SparsityCallback(USUAL, pattern=(2, 4)), "pattern=(2, 4) is no pattern: give its name, such as '2:4'"),
        (lambda: SparsityCallback(USUAL, pattern=24), "pattern=24 is no pattern"),
        (lambda: NofM(4, 2), "NofM(4, 2) keeps no part of a block: give N:M with N below M"),
        (lambda: NofM("2", 4), "kept='2' is not a whole number"),
        (lambda: Blocks(1, 1), "Blocks(1, 1) has no two weights"),
        (lambda: Blocks(4.0, 1), "rows=4.0 is not a whole number: give one, such as 4."),
        (lambda: SparsityCallback(USUAL, scope=Uniform), "scope=Uniform is a class: give an instance, Uniform()."),
        (lambda: SparsityCallback(USUAL, scope=["uniform"]), "scope=['uniform'] is no Scope: extend sparsity's Scope"),
        (lambda: SparsityCallback(USUAL, scope=Magnitude()), "scope=magnitude is no Scope"),
        (lambda: SparsityCallback(USUAL, score=Uniform()), "score=uniform is no Score: extend sparsity's Score"),
        (lambda: SparsityCallback(USUAL, score=Magnitude), "score=Magnitude is a class: give an instance"),
        (lambda: SparsityCallback(USUAL, score=abs), "score=<built-in function abs> is no Score"),
        (lambda: SparsityCallback(USUAL, score=Blind()), "does not rank weights: define `values` in a class that extends"),
        (lambda: SparsityCallback(USUAL, score=Greedy()), "has needs=('activation',): give a tuple of 'gradient', 'state'"),
        (lambda: Random(1.5), "seed=1.5 is not a whole number"),
        (lambda: SparsityCallback(USUAL, update=AcDc), "update=AcDc is a class: give an instance"),
        (lambda: SparsityCallback(USUAL, update=Scope()), "is no Update: extend sparsity's Update"),
        (lambda: Rigl(share="0.3"), "moves.share='0.3' is not a number"),
        (lambda: Set(every_steps="100"), "moves.every='100' is not a whole number"),
        (lambda: Ste(end=None), "moves.end=None is not a number"),
        (lambda: SparsityCallback(USUAL, normalize=2), "normalize=2 is not known: choose one of none, l2, rms."),
        (lambda: SparsityCallback(USUAL, factors=0.5), "factors=0.5 is no mapping"),
        (lambda: SparsityCallback(USUAL, factors={"*q_proj*": "0.5"}), "factors['*q_proj*']='0.5' is not a number"),
        # --- parameters ---
        (lambda: Group("*mlp*", 0.5), "include='*mlp*' is one text, not a list of name patterns: give ['*mlp*']."),
        (lambda: Group(("*mlp*",), 80), "The group *mlp* has a target of 80, outside [0, 1)"),
        (lambda: Group(("*mlp*",), "0.8"), "sparsity='0.8' is not a number"),
        (lambda: SparsityCallback(USUAL, groups=Group(("*mlp*",), 0.5)), "is no list of groups: give one"),
        (lambda: SparsityCallback(USUAL, groups=[{"include": ["*mlp*"]}]), "is no list of groups: give one, such as [Group("),
        (lambda: SparsityCallback(USUAL, include="*proj*"), "include='*proj*' is one text"),
        (lambda: SparsityCallback(USUAL, requires_dense="lm_head.weight"), "requires_dense='lm_head.weight' is one text"),
        (lambda: SparsityCallback(USUAL, requires_dense=None), "requires_dense=None is not a list of name patterns"),
        (lambda: prunable_parameters(nn.Linear(4, 4), include="*"), "include='*' is one text"),
        # --- the rest ---
        (lambda: SparsityCallback(USUAL, seed="0"), "seed='0' is not a whole number"),
        (lambda: SparsityCallback(USUAL, score="wanda", calibration="5"), "calibration='5' is not a whole number"),
        (lambda: SparsityCallback(USUAL, report="no"), "report='no' is neither True nor False"),
        (lambda: SparsityCallback(USUAL, keep_zeros=1), "keep_zeros=1 is neither True nor False"),
        (lambda: SparsityCallback(USUAL, scopes="uniform"), "There is no argument 'scopes': did you mean scope?"),
        (lambda: Pruner(USUAL, target=0.8), "There is no argument 'target': choose from schedule, score, factors,"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_at_once(make: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))


def test_numbers_of_numpy_are_numbers() -> None:
    schedule = Geometric(np.float64(0.5), np.int64(0), np.int64(200), np.int32(100))
    callback = SparsityCallback(
        schedule, score="wanda", calibration=np.int64(8), groups=[Group(["*a*"], np.float32(0.5))]
    )
    assert callback.pruner.events == {0, 100, 200}
    assert SparsityCallback(Fixed()).keep_zeros


class Halved(Ramp):
    """A schedule that gives its densities directly."""

    def density(self, step: int) -> float:
        return 0.5 if step >= self.start_step else 1.0


class OwnSchedule:
    """A schedule of a user's, which extends nothing of ours; numpy computes its steps."""

    def density(self, step: int) -> float:
        return np.float64(0.5 ** (step / 10))

    def events(self) -> Any:
        return np.linspace(10, 30, 3).astype(int)

    def average_density(self, num_steps: int) -> float:
        return 0.5


def test_what_has_the_methods_of_a_schedule_is_one() -> None:
    assert SparsityCallback(OwnSchedule()).pruner.events == {10, 20, 30}
    assert SparsityCallback(Halved(0.5, 10, 30, 10)).pruner.events == {10, 20, 30}


def test_name_patterns_may_be_any_collection() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    patterns = OmegaConf.create(["0.*"])
    for given in (["0.*"], ("0.*",), {"0.*"}, frozenset({"0.*"}), {"0.*": 1}.keys(), np.array(["0.*"]), patterns):
        callback = SparsityCallback(USUAL, requires_dense=given, keep_zeros=np.False_)
        callback.bind(model)
        assert list(callback.kept) == ["1.weight"], type(given)
