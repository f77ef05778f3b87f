"""The commands for a GPU: the promises of their runner, and a rehearsal of their steps on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, quiet_environment
from tests.gpu import bench, check
from tests.gpu.__main__ import parse
from tests.gpu.large_run import EVENTS, figures, overrides, problems, top_kernels, write_text
from tests.gpu.page import page
from tests.gpu.runner import Result, Step, may_start, processes_with, refusal, run_steps, telling_lines

SAYS = "print('all is well')"
FAILS = "print('some words'); raise SystemExit('no such luck')"
WRITES = "import json, os; json.dump({'rate': 7}, open(os.environ['STEP_FIGURES'], 'w'))"
HANGS = """
import os, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(0.5)
print("as far as here", flush=True)
time.sleep(60)
"""


def step(name: str, code: str = SAYS, **changes: Any) -> Step:
    return Step(name, (sys.executable, "-c", code), **{"expected_s": 0.0, "timeout_s": 30.0, **changes})


def run(steps: list[Step], folder: Path, budget_s: float = 60.0, parallel: int = 1) -> list[Result]:
    return run_steps(
        "check", steps, folder, budget_s=budget_s, parallel=parallel, environment=dict(os.environ), details={"x": 1}
    )


def test_a_failure_costs_no_other_step_and_its_last_words_are_kept(tmp_path, capsys):
    found = run([step("first", FAILS), step("second"), step("third", WRITES)], tmp_path)
    assert [result.outcome for result in found] == ["failed", "passed", "passed"]
    assert found[0].words == "exit code 1: no such luck"
    assert found[2].figures == {"rate": 7}
    written = json.loads((tmp_path / "check.json").read_text())
    assert [one["outcome"] for one in written["steps"]] == ["failed", "passed", "passed"]
    assert written["x"] == 1
    log = (tmp_path / "check.log").read_text()
    assert "some words" in log
    assert "all is well" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "check.log"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "|" not in line] == [
        "failed", "passed", "passed"
    ]  # fmt: skip


def test_a_step_that_hangs_ends_with_all_that_it_started_whatever_its_session(tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr("tests.gpu.runner.uuid.uuid4", lambda: marks.append(f"m{time.time_ns()}") or Hex(marks[-1]))
    (found,) = run([step("hangs", HANGS, timeout_s=3.0)], tmp_path)
    assert found.outcome == "timed out"
    assert found.words == "longer than 3 s; its last line: as far as here"
    assert 3 <= found.seconds < 10
    assert processes_with(marks[0]) == []


class Hex:
    def __init__(self, hex: str) -> None:
        self.hex = hex


def test_a_process_that_a_step_leaves_behind_is_ended_too(tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr("tests.gpu.runner.uuid.uuid4", lambda: marks.append(f"m{time.time_ns()}") or Hex(marks[-1]))
    leaves = HANGS.replace("time.sleep(0.5)", "time.sleep(0.5); raise SystemExit")
    (found,) = run([step("leaves", leaves)], tmp_path)
    assert found.outcome == "passed"
    assert processes_with(marks[0]) == []


def test_what_does_not_fit_or_is_not_installed_is_recorded_as_not_run(tmp_path):
    steps = [step("short"), step("long", expected_s=100.0), step("other", needs=("no_such_package",)), step("last")]
    found = run(steps, tmp_path, budget_s=30.0)
    assert [result.outcome for result in found] == ["passed", "not run", "not run", "passed"]
    assert found[1].words.startswith("out of time: ")
    assert found[1].words.endswith("s left of the budget, it takes some 100 s")
    assert found[2].words == "no_such_package not installed"


def test_a_step_runs_no_longer_than_the_budget(tmp_path):
    started = time.monotonic()
    (found,) = run([step("long", "import time; time.sleep(60)", timeout_s=50.0)], tmp_path, budget_s=1.0)
    assert found.outcome == "timed out"
    assert time.monotonic() - started < 20


def test_results_are_there_while_later_steps_run(tmp_path):
    looks = f"import json; print(len(json.load(open({str(tmp_path / 'check.json')!r}))['steps']), 'before')"
    found = run([step("one"), step("two", looks)], tmp_path)
    assert found[1].words == "1 before"


@pytest.mark.parametrize(
    ("alone", "running", "expected"),
    [
        (False, [], True),
        (False, [False, False], True),
        (False, [False, False, False], False),
        (False, [True], False),
        (True, [], True),
        (True, [False], False),
    ],
)
def test_a_step_that_is_alone_shares_the_device_with_none(alone, running, expected):
    others = [step(str(index), alone=value) for index, value in enumerate(running)]
    assert may_start(step("x", alone=alone), others, parallel=3) is expected


def test_what_a_failed_test_says_comes_before_the_rest():
    text = "a\nFAILED tests/test_x.py::test_y - AssertionError\nb\n1 failed"
    assert telling_lines(text) == ["FAILED tests/test_x.py::test_y - AssertionError"]
    assert telling_lines("a\n\nb") == ["a", "b"]
    assert refusal(step("x", needs=("json",)), 5.0) is None


def test_every_test_file_with_the_mark_is_a_step_of_its_own(tmp_path):
    for folder, name, text in [
        ("gpu", "test_a_gpu.py", "pytestmark = [\n    pytest.mark.slow,\n    pytest.mark.gpu,\n]"),
        ("gpu", "test_d_gpu.py", "pytestmark = [pytest.mark.gpu, pytest.mark.slow]"),
        ("", "test_b.py", "@pytest.mark.gpu\ndef test_b(): pass"),
        ("", "test_c.py", "def test_c(): pass"), ("gpu", "helper.py", "mark.gpu"),
    ]:  # fmt: skip
        (tmp_path / "tests" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / folder / name).write_text(text)
    assert check.gpu_test_files(tmp_path) == [
        "tests/gpu/test_a_gpu.py", "tests/gpu/test_d_gpu.py", "tests/test_b.py"
    ]  # fmt: skip
    found = check.gpu_test_files()
    assert {"tests/gpu/test_masks_gpu.py", "tests/test_pattern.py", "tests/test_failures.py"} <= set(found)
    assert "tests/test_gpu_commands.py" not in found


@pytest.mark.parametrize("make", [check.steps, bench.steps], ids=["check", "bench"])
def test_what_the_steps_are_expected_to_take_fits_into_five_minutes(tmp_path, make):
    steps = make(tmp_path / "work", tmp_path / "out", False)
    beside = [one for one in steps if not one.alone]
    expected = sum(one.expected_s for one in steps if one.alone)
    expected += max([sum(one.expected_s for one in beside) / 10, *(one.expected_s for one in beside)], default=0.0)
    assert expected <= 300
    assert len({one.name for one in steps}) == len(steps)


@pytest.mark.parametrize("make", [check.steps, bench.steps], ids=["check", "bench"])
def test_no_step_that_is_alone_waits_for_the_slowest_of_those_that_run_together(tmp_path, make):
    is_alone = [one.alone for one in make(tmp_path / "work", tmp_path / "out", False)]
    assert is_alone == sorted(is_alone, reverse=True)


def test_only_commands_that_train_runs_of_their_own_choice_take_overrides(capsys):
    assert parse(["claim", "--budget", "9", "optim.learning_rate=0.004"]).overrides == ["optim.learning_rate=0.004"]
    with pytest.raises(SystemExit):
        parse(["check", "optim.learning_rate=0.004"])
    assert "optim.learning_rate=0.004 is an override of a run, which check does not take" in capsys.readouterr().err


def test_the_run_of_the_1b_has_three_events_before_its_end(tmp_path):
    found = overrides(tmp_path, 30, 8, dense=False, rehearse=False)
    assert "model=llama2_1b" in found
    assert "trainer=gpu" in found
    assert len(EVENTS) == 3
    assert max(EVENTS) < 30
    assert "sparsity=dense" in overrides(tmp_path, 30, 8, dense=True, rehearse=False)


def test_text_for_the_1b_has_words_enough(tmp_path):
    write_text(tmp_path / "text.jsonl", 200_000)
    lines = (tmp_path / "text.jsonl").read_text().splitlines()
    words = {word for line in lines for word in json.loads(line)["text"].split()}
    assert len(words) > 5_000


def run_files(folder: Path, losses: list[float]) -> Path:
    records = [{"train/loss": loss, "train/tokens_per_second": 100.0 * n} for n, loss in enumerate(losses, 1)]
    (folder / "model").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, {"eval": 1}]))
    summary = {"steps": len(losses), "sparsity": 0.8, "batch_tokens": 800}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_figures_of_a_run_leave_out_its_first_steps(tmp_path):
    found = figures(run_files(tmp_path, [3.1, 3.01, 2.9, 2.8, 2.7, 2.6, 2.55, 2.53]), None, 1.0)
    assert found["tokens_per_second_median"] == 700.0
    assert found["step_seconds_median"] == pytest.approx(800 / 700)
    assert problems(found, 8, dense=False) == []
    assert problems(found, 8, dense=True) == ["a sparsity of 0.8 instead of 0.0"]
    assert "8 steps and 8 losses instead of 9" in problems(found, 9, dense=False)


def test_losses_that_were_rounded_to_bfloat16_are_found_out(tmp_path):
    (wrong,) = problems(figures(run_files(tmp_path, [8.4375, 7.40625, 6.09375, 5.25]), None, 1.0), 4, dense=False)
    assert wrong.startswith("losses that are rounded to bfloat16")


def test_the_kernels_of_a_trace_are_added_up():
    events = [
        {"cat": "kernel", "name": "a", "dur": 5}, {"cat": "kernel", "name": "b", "dur": 7},
        {"cat": "kernel", "name": "a", "dur": 3}, {"cat": "cpu_op", "name": "c", "dur": 100}, {"name": "d"},
    ]  # fmt: skip
    assert top_kernels({"traceEvents": events}) == [
        {"name": "a", "microseconds": 8, "calls": 2, "share": 8 / 15},
        {"name": "b", "microseconds": 7, "calls": 1, "share": 7 / 15},
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("command", "only", "files"),
    [
        ("check", "1B", {"check.json", "check.log"}),
        ("bench", "tokens", {"bench.json", "bench.log", "throughput.json"}),
        ("claim", "80p-seed0", {"claim.json", "claim.log"}),
    ],
)
def test_a_rehearsal_runs_steps_of_the_command_on_the_cpu(tmp_path, command, only, files):
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", command, "--rehearse", "--only", only], cwd=ROOT, timeout=880, text=True,
        env=quiet_environment({"OUT": str(tmp_path)}), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} - {"trace.json.gz"} == files
    written = json.loads((tmp_path / f"{command}.json").read_text())
    assert written["rehearsal"] is True
    assert {one["outcome"] for one in written["steps"]} == {"passed"}
    if command == "claim":
        sparse, dense = sorted(written["steps"], key=lambda one: one["name"])
        assert sparse["figures"]["summary"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
        assert dense["figures"]["summary"]["linear_params"] < sparse["figures"]["summary"]["linear_params"]
        assert "recipe: authors" in sparse["figures"]["config"]
    if command == "bench":
        rows = json.loads((tmp_path / "throughput.json").read_text())
        assert any(row["tokens_per_second"] > 0 for row in rows)


def test_the_page_of_the_device_is_made_of_its_files():
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8") == page(ROOT / "docs" / "gpu")
