"""A sweep on this machine: finished jobs do not run again, failed ones can be run alone, and how the sweep ends."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

import launch.local as local
from conf.schema import Config
from eval.runs.sweep import draw_sweep, sweep_points
from launch.outcome import close_search
from launch.process import Task, run_children
from launch.remote import check_plugins, world_size
from launch.sweep import read_sweep
from train.plan.run import plan_run

FIGURES = {
    "total_params": 2_000_000, "linear_params": 1_000_000, "nonzero_linear_params": 500_000, "batch_tokens": 4096,
    "learning_rate": 3e-3, "total_tokens": 1_000_000, "final_train_loss_std": 0.01, "perplexity": 12.5,
}  # fmt: skip


def finish(config: Config, loss: float) -> None:
    """Write the files of a finished run."""
    folder = plan_run(config, 2).run_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    sparsity = config.sparsity.target
    own = {"run_name": config.run_name, "sparsity": sparsity, "avg_linear_params": 1e6 * (1 - sparsity / 2)}
    (folder / "summary.json").write_text(json.dumps({**FIGURES, **own, "final_train_loss": loss, "heldout_loss": loss}))


@pytest.fixture
def children(monkeypatch):
    """Replace processes by a fake that notes each task's command, and finishes or fails its job as `outcomes` says."""

    class Children:
        def __init__(self) -> None:
            self.outcomes: dict[str, float | int | None] = {}
            self.ran: list[str] = []

        def run(self, tasks, places, on_start, on_end):
            codes = []
            for index, task in enumerate(tasks):
                (name,) = [item.removeprefix("run_name=") for item in task.command if item.startswith("run_name=")]
                self.ran.append(name.split("/")[1])
                on_start(index)
                outcome = self.outcomes[name.split("/")[1]]
                if isinstance(outcome, float):
                    finish(next(job.config for job in self.sweep.jobs if job.name == name), outcome)
                codes.append(0 if isinstance(outcome, float) else outcome)
                if codes[-1] is not None:
                    on_end(index, codes[-1])
            return codes

    fake = Children()
    monkeypatch.setattr(local, "run_children", fake.run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return fake


def sweep_of(tmp_path: Path, *more: str):
    return read_sweep(["experiment=demo", f"runs_dir={tmp_path}", "sweep_name=s", "sparsity.target=0,0.5,0.8", *more])


def test_a_failed_job_is_named_with_its_own_command_and_alone_run_again(tmp_path, children, capsys):
    children.sweep = sweep = sweep_of(tmp_path)
    children.outcomes = {"sparsity.target-0": 3.5, "sparsity.target-0.5": 3, "sparsity.target-0.8": 3.9}
    assert local.sweep_here(sweep) == 1
    said = capsys.readouterr()
    assert children.ran == ["sparsity.target-0", "sparsity.target-0.5", "sparsity.target-0.8"]
    assert "error: 1 of the sweep's 3 jobs did not finish" in said.err
    command = said.err.strip().splitlines()[-1].split()
    assert command[:3] == ["python", "-m", "launch"]
    (alone,) = read_sweep(command[3:]).jobs
    assert alone.config == sweep.jobs[1].config
    rows = [line for line in said.out.splitlines() if line.startswith("| sparsity.target-")]
    assert [row.split()[1] for row in rows] == ["sparsity.target-0", "sparsity.target-0.8"]

    children.outcomes, children.ran = {"sparsity.target-0.5": 3.7}, []
    assert local.sweep_here(sweep) == 0
    assert children.ran == ["sparsity.target-0.5"]
    said = capsys.readouterr()
    assert said.err.count("already finished\n") == 2
    assert "3.700" in said.out
    assert imread(tmp_path / "s" / "sweep.png").std() > 0.01


def test_with_overwrite_a_job_that_was_not_begun_is_not_done_and_keeps_overwrite_in_its_command(
    tmp_path, children, capsys
):
    children.sweep = sweep = sweep_of(tmp_path, "overwrite=true")
    for job in sweep.jobs:
        finish(job.config, 3.0)
    children.outcomes = {"sparsity.target-0": 3.5, "sparsity.target-0.5": 75, "sparsity.target-0.8": None}
    assert local.sweep_here(sweep) == 75
    said = capsys.readouterr()
    assert said.out.count("| sparsity.target-") == 1
    assert "the same command" not in said.err
    *_, begun, _, not_begun = said.err.strip().splitlines()[-4:]
    assert ("overwrite=True" in begun, "overwrite=True" in not_begun) == (False, True)


def test_a_job_that_was_preempted_makes_the_sweep_end_as_preempted(tmp_path, children, capsys):
    children.sweep = sweep = sweep_of(tmp_path)
    children.outcomes = {"sparsity.target-0": 3.5, "sparsity.target-0.5": 75, "sparsity.target-0.8": 75}
    assert local.sweep_here(sweep) == 75


def test_a_folder_of_another_config_is_refused_before_any_job_starts(tmp_path, children):
    finish(sweep_of(tmp_path, "optim.weight_decay=0.3").jobs[1].config, 3.0)
    with pytest.raises(ValueError, match=r"1 of the sweep's 3 jobs are invalid.*weight_decay was 0.3, is 0.1"):
        local.sweep_here(sweep_of(tmp_path))
    assert children.ran == []


def test_overwrite_runs_everything_again_and_is_left_out_of_the_commands(tmp_path, children, capsys):
    children.sweep = sweep = sweep_of(tmp_path, "overwrite=true")
    for job in sweep.jobs:
        finish(job.config, 3.0)
    children.outcomes = {"sparsity.target-0": 3.5, "sparsity.target-0.5": 9, "sparsity.target-0.8": 3.9}
    assert local.sweep_here(sweep) == 1
    assert len(children.ran) == 3
    assert "overwrite=" not in capsys.readouterr().err.split("use a job's own command")[1]


SCRIPT = "import sys, time; time.sleep(float(sys.argv[1])); print(sys.argv[2]); sys.exit(int(sys.argv[3]))"


def task(seconds: float, word: str = "", code: int = 0, log: Path | None = None) -> Task:
    return Task([sys.executable, "-S", "-c", SCRIPT, str(seconds), word, str(code)], {}, log)


def test_tasks_run_in_order_as_many_at_a_time_as_there_are_places(tmp_path):
    running, most, starts = set(), [], []

    def on_start(index: int) -> None:
        running.add(index)
        starts.append(index)
        most.append(len(running))

    tasks = [task(0.2, f"task {number}", number, tmp_path / "logs" / f"{number}.log") for number in range(5)]
    codes = run_children(tasks, [{}, {}], on_start, lambda index, code: running.remove(index))
    assert codes == [0, 1, 2, 3, 4]
    assert starts == [0, 1, 2, 3, 4]
    assert max(most) == 2
    assert (tmp_path / "logs" / "3.log").read_text() == "task 3\n"


def test_a_signal_reaches_the_running_task_and_no_other_is_begun():
    threading.Timer(1.0, signal.raise_signal, [signal.SIGTERM]).start()
    started = time.monotonic()
    codes = run_children([task(30), task(30)])
    assert codes == [-signal.SIGTERM, None]
    assert time.monotonic() - started < 20
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_each_place_has_its_own_environment(tmp_path):
    script = "import os, sys, time; time.sleep(0.3); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    tasks = [Task([sys.executable, "-S", "-c", script], {}, tmp_path / f"{number}") for number in range(2)]
    run_children(tasks, [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}])
    assert {(tmp_path / f"{number}").read_text() for number in range(2)} == {"0,1\n", "2,3\n"}


def test_the_figure_has_every_run_with_a_loss(tmp_path):
    runs = [
        {"avg_linear_params": 2e6, "final_train_loss": 3.1, "sparsity": 0.0},
        {"avg_linear_params": 1e6, "final_train_loss": 3.3, "sparsity": 0.8},
        {"avg_linear_params": 1e6, "final_train_loss": float("nan"), "sparsity": 0.5},
    ]
    assert sweep_points(runs) == [(1e6, 3.3, 0.8), (2e6, 3.1, 0.0)]
    draw_sweep(runs, tmp_path / "s" / "sweep.png", "s")
    assert imread(tmp_path / "s" / "sweep.png").std() > 0.01


def test_a_search_ends_with_its_best_run_first(tmp_path, capsys):
    for job, loss in zip(sweep_of(tmp_path).jobs, (3.5, 3.2, 3.9), strict=True):
        finish(job.config, loss)
    assert close_search(tmp_path / "s") == 0
    rows = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith(("| sparsity", "best"))]
    assert rows == ["sparsity.target-0.5", "sparsity.target-0", "sparsity.target-0.8", "sparsity.target-0.5:"]
    assert close_search(tmp_path / "nothing") == 1


def test_a_trial_that_diverged_comes_last_in_a_search(tmp_path, capsys):
    jobs = sweep_of(tmp_path).jobs
    for job, loss in zip(jobs, (float("nan"), 3.2, 3.9), strict=True):
        finish(job.config, loss)
    assert close_search(tmp_path / "s") == 0
    out = capsys.readouterr().out
    rows = [line.split()[1] for line in out.splitlines() if line.startswith(("| sparsity", "best"))]
    assert rows == ["sparsity.target-0.5", "sparsity.target-0.8", "sparsity.target-0", "sparsity.target-0.5:"]
    for job in jobs:
        finish(job.config, float("nan"))
    assert close_search(tmp_path / "s") == 1
    assert "no trial of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"name": "submitit_slurm", "nodes": 2, "gpus_per_node": 8}, 16),
        ({"name": "submitit_slurm", "nodes": 4, "gres": "gpu:a100:4"}, 16),
        ({"name": "submitit_slurm", "nodes": 2}, 4),
        ({"name": "submitit_local", "nodes": 1}, 2),
    ],
)
def test_a_job_is_planned_for_the_processes_it_will_have(launcher, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (job,) = read_sweep(["experiment=demo"]).jobs
    assert world_size(job.config, launcher) == expected


def test_a_missing_plugin_is_named_with_what_brings_it(monkeypatch):
    monkeypatch.setattr("launch.remote._is_there", lambda module: False)
    with pytest.raises(ValueError, match=r"needs a plugin that is not installed: pip install 'sparsellm\[slurm\]'"):
        check_plugins(["hydra/launcher=submitit_slurm", "experiment=demo"])
    with pytest.raises(ValueError, match=r"sparsellm\[search\]"):
        check_plugins(["sweep=optuna_window"])
    check_plugins(["experiment=demo", "sweep=twin_pairs"])
