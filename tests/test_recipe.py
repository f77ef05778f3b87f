"""Settings that transformers and torch would refuse after the data is prepared are refused before, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from accelerate import PartialState
from transformers import SchedulerType
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from conf.compose import composed
from conf.schema.choices import COMPILE_MODES, INTERVALS, OPTIMIZERS, SCHEDULERS
from tests.test_run import tiny
from train.arguments import MUON, check_recipe, training_arguments
from train.model.build import build_skeleton
from train.plan.run import plan_run


@pytest.mark.parametrize(
    ("names", "enum"), [(OPTIMIZERS, OptimizerNames), (SCHEDULERS, SchedulerType), (INTERVALS, IntervalStrategy)]
)
def test_the_names_are_transformers_own(names: tuple[str, ...], enum: Any):
    assert set(names) - {MUON} == {item.value for item in enum} - {MUON}


def test_the_compile_modes_are_torchs_own():
    assert set(torch._inductor.list_mode_options()) - {"reduce-overhead"} <= set(COMPILE_MODES)


def recipe(*overrides: str) -> None:
    """Check a recipe as a rank does before the data is prepared."""
    PartialState(cpu=True)
    config = composed("train", tiny(Path("nowhere"), *overrides))
    plan = plan_run(config, 1)
    check_recipe(training_arguments(config, plan, Path("nowhere")), build_skeleton(plan.model))


@pytest.mark.parametrize(
    "settings",
    [
        ["optim.optim=sgd"],
        ["optim.optim=adafactor", "optim.lr_scheduler_type=linear"],
        ["optim.lr_scheduler_type=warmup_stable_decay", "+optim.lr_scheduler_kwargs.num_decay_steps=4"],
        ["trainer.eval_strategy=steps", "trainer.eval_steps=4", "optim.lr_scheduler_type=reduce_lr_on_plateau"],
        ["model.attn_implementation=eager", "trainer.torch_compile=true"],
    ],
)
def test_recipes_that_can_be_are_taken(settings):
    recipe(*settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.optim=lomo"], r"optim\.optim=lomo cannot be created: You need to install `lomo_optim`"),
        (["optim.optim=adamw_torch_xla"], r"optim\.optim=adamw_torch_xla cannot be created"),
        (
            ["optim.lr_scheduler_type=warmup_stable_decay"],
            r"lr_scheduler_type=warmup_stable_decay does not say when it decays: set optim\.decay_steps=0\.2",
        ),
        (
            [
                "trainer.eval_strategy=steps",
                "trainer.eval_steps=4",
                "optim.lr_scheduler_type=reduce_lr_on_plateau",
                "+optim.lr_scheduler_kwargs.foo=1",
            ],
            r"does not fit optim\.lr_scheduler_type=reduce_lr_on_plateau: .*'foo'",
        ),
        (["model.attn_implementation=flash"], r"model\.attn_implementation=flash cannot be used"),
        (
            ["trainer.torch_compile=true", "trainer.torch_compile_backend=foo"],
            r"trainer\.torch_compile_backend=foo is not known to torch: choose one of .*inductor",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused_by_their_key(settings, words):
    with pytest.raises(ValueError, match=words):
        recipe(*settings)


def test_a_library_that_a_setting_needs_is_named(monkeypatch):
    monkeypatch.setattr("train.arguments.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the library liger-kernel: pip install liger-kernel"):
        recipe("trainer.use_liger_kernel=true")
