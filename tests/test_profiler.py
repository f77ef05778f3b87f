"""The profile of some steps: its steps, the contents of its files, and that it never makes a run fail."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import record_function
from transformers import TrainerControl, TrainerState

from conf.schema import TrainerConfig
from train.speed.profiler import StepProfiler
from train.speed.throughput import StepClock


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    """Run steps of a small model, each recorded under the name of the step."""
    model, state, control = nn.Linear(8, 8), TrainerState(), TrainerControl()
    called: Any = {"args": None, "state": state, "control": control}
    for step in range(first, last + 1):
        state.global_step = step - 1
        profiler.on_step_begin(**called)
        with record_function(f"step {step}"):
            model(torch.ones(2, 8)).sum().backward()
        state.global_step = step
        profiler.on_step_end(**called)
    profiler.on_train_end(**called)


def profiler_of(folder: Path, first: int, last: int) -> StepProfiler:
    return StepProfiler(first, last, folder, StepClock(torch.device("cpu")))


def steps_in(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


def test_the_trace_has_the_first_and_the_last_step_and_no_other(tmp_path):
    run_steps(profiler_of(tmp_path / "profile", 3, 5), 1, 8)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "steps-3-5.kernels.txt",
        "steps-3-5.trace.json.gz",
    ]
    assert steps_in(tmp_path / "profile" / "steps-3-5.trace.json.gz") == ["step 3", "step 4", "step 5"]
    table = (tmp_path / "profile" / "steps-3-5.kernels.txt").read_text()
    assert "aten::addmm" in table
    assert "Self CPU" in table


def test_a_run_that_resumes_inside_the_range_profiles_the_rest_of_it(tmp_path):
    run_steps(profiler_of(tmp_path, 3, 5), 4, 8)
    assert steps_in(tmp_path / "steps-4-5.trace.json.gz") == ["step 4", "step 5"]


def test_a_run_that_ends_inside_the_range_writes_what_it_has(tmp_path):
    run_steps(profiler_of(tmp_path, 3, 50), 1, 4)
    assert steps_in(tmp_path / "steps-3-4.trace.json.gz") == ["step 3", "step 4"]


@pytest.mark.parametrize(("first", "last"), [(1, 2), (9, 12)])
def test_a_run_without_these_steps_writes_nothing(tmp_path, first, last):
    run_steps(profiler_of(tmp_path / "profile", first, last), 4, 6)
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "profile").write_text("in the way")
    run_steps(profiler_of(tmp_path / "profile", 1, 2), 1, 3)
    assert capsys.readouterr().err.startswith("warning: the profile could not be written: ")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([3], r"profile_steps=\[3\] is not a range of steps"),
        ([5, 4], r"profile_steps=\[5, 4\] is not a range of steps"),
        ([0, 4], r"profile_steps=\[0, 4\] is not a range of steps"),
        ([3, 1001], r"profile_steps=\[3, 1001\] ends after trainer.max_steps=1000"),
    ],
)
def test_a_range_that_is_none_is_refused(steps, said):
    with pytest.raises(ValueError, match=said):
        TrainerConfig(profile_steps=steps)
