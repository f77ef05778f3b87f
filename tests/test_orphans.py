"""A launcher that is killed: what ends with it, what keeps running, and that the same command completes the sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.alive import is_controller, job_numbers, queued, wait_for_live_jobs
from tests.commands import run_command
from tests.processes import descendants, is_alive, launched, send
from tests.test_run import tiny, write_text
from train.record.directory import RunDirectory

STEPS = 100


def sweep_command(folder: Path, *more: str) -> list[str]:
    own = [item for item in tiny(folder, "logger=none") if not item.startswith("run_name")]
    return [
        "-m", *own, f"trainer.max_steps={STEPS}", "trainer.save_steps=10", "launch.num_processes=1", "sweep_name=s",
        "sparsity.target=0,0.5", *more,
    ]  # fmt: skip


def first_job(folder: Path) -> Path:
    return folder / "runs" / "s" / "sparsity.target-0"


def check_finished(folder: Path, output: str) -> None:
    rows = {line.split()[1] for line in output.splitlines() if line.startswith("| sparsity")}
    assert rows == {"sparsity.target-0", "sparsity.target-0.5"}
    for target in ("0", "0.5"):
        summary = json.loads((folder / "runs" / "s" / f"sparsity.target-{target}" / "summary.json").read_text())
        assert summary["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_whose_launcher_is_killed_leaves_no_process_and_the_same_command_ends_it(tmp_path):
    write_text(tmp_path / "text.jsonl")
    command = sweep_command(tmp_path)
    with launched(command, first_job(tmp_path)) as run:
        run.wait_for_step(15)
        children = descendants(run.process.pid)
        assert len(children) >= 2
        send(run.process.pid, signal.SIGKILL)
        run.process.wait(30)
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a process outlived its launcher"
        time.sleep(0.1)
    again = run_command(["launch", *command], timeout_s=600)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed from" in again.stdout
    check_finished(tmp_path, again.stdout)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_of_submitit_outlive_their_launcher_and_the_same_command_waits_for_them(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'sparsellm[slurm]'")
    write_text(tmp_path / "text.jsonl")
    command = sweep_command(tmp_path, "hydra/launcher=submitit_local")
    with launched(command, first_job(tmp_path)) as run:
        run.wait_for_step(15)
        children = descendants(run.process.pid)
        send(run.process.pid, signal.SIGKILL)
        run.process.wait(30)
    try:
        numbers = job_numbers(tmp_path / "runs" / "s")
        again = run_command(["launch", *command], timeout_s=600)
    finally:
        for pid in children:
            send(pid, signal.SIGKILL)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "of an earlier command still run: waiting for them" in again.stderr
    assert "nothing is submitted" in again.stderr
    assert job_numbers(tmp_path / "runs" / "s") == numbers
    check_finished(tmp_path, again.stdout)


def test_an_array_is_one_job_and_other_folders_are_none(tmp_path):
    for name in ("77_0", "77_1", "123", "notes"):
        (tmp_path / ".submitit" / name).mkdir(parents=True)
    assert job_numbers(tmp_path) == ["123", "77"]
    assert job_numbers(tmp_path / "nowhere") == []


def test_the_queue_is_asked_for_our_jobs_only(tmp_path, monkeypatch):
    program = tmp_path / "squeue"
    program.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\nprintf "77\\n77\\n500\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert queued(["123", "77"]) == ["77"]
    assert "--format=%F" in (tmp_path / "asked").read_text()
    assert queued([]) == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert queued(["77"]) == []


def test_a_process_is_a_job_only_if_it_is_submitits():
    words = [sys.executable, "-c", "import time; time.sleep(60)", "submitit.local._local"]
    for command, expected in ((words, True), (words[:3], False)):
        process = subprocess.Popen(command)
        try:
            time.sleep(0.2)
            assert is_controller(str(process.pid)) == expected
        finally:
            process.kill()
            process.wait()
        assert not is_controller(str(process.pid))


def sweep_of(folder: Path, overwrite: bool) -> tuple[SimpleNamespace, list[SimpleNamespace]]:
    job = SimpleNamespace(name="s/a", config=SimpleNamespace(overwrite=overwrite))
    sweep = SimpleNamespace(name="s", folder=folder, launcher={"name": "submitit_slurm"}, jobs=[job])
    return sweep, [SimpleNamespace(job=job, plan=SimpleNamespace(run_dir=folder / "a"))]


def test_the_wait_ends_with_the_last_job_and_overwrite_does_not_wait(tmp_path, monkeypatch):
    (tmp_path / ".submitit" / "77_0").mkdir(parents=True)
    answers = iter([["77"], ["77"], []])
    monkeypatch.setattr("launch.alive.queued", lambda _: next(answers))
    said: list[str] = []
    assert wait_for_live_jobs(*sweep_of(tmp_path, False), said.append, poll_s=0.01)
    assert said == ["job 77 of an earlier command still run: waiting for them; Ctrl-C ends the waiting, not the jobs"]
    monkeypatch.setattr("launch.alive.queued", lambda _: [])
    assert not wait_for_live_jobs(*sweep_of(tmp_path, False), said.append)
    monkeypatch.setattr("launch.alive.queued", lambda _: ["77"])
    with pytest.raises(ValueError, match="overwrite=true would start them again: end them"):
        wait_for_live_jobs(*sweep_of(tmp_path, True), said.append)


def test_a_folder_is_in_use_while_a_process_holds_it(tmp_path):
    holding = "import sys, filelock as f; l = f.FileLock(sys.argv[1]); l.acquire(); print('held', flush=True); input()"
    directory = RunDirectory(tmp_path)
    assert not directory.is_in_use()
    process = subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert directory.is_in_use()
        sweep, planned = sweep_of(tmp_path.parent, False)
        planned[0].plan.run_dir = tmp_path
        from launch.alive import live_jobs

        assert live_jobs(sweep, planned) == ["s/a"]
    finally:
        process.kill()
        process.wait()
    assert not directory.is_in_use()
