"""A sweep by Hydra's launchers and sweepers: jobs run in their planned folders, and a search stops when it is asked to."""

from __future__ import annotations

import signal

import pytest

from conf.compose import composed
from conf.schema import Config
from launch import remote
from launch.sweep import Sweep, finished_job, read_sweep
from tests.test_sweep import finish
from train.plan.run import plan_run


@pytest.fixture
def runs(monkeypatch):
    """Replace runs by a fake that notes each, and finishes it or returns the exit code that `codes` has for its number."""

    class Runs:
        def __init__(self) -> None:
            self.codes: dict[int, int] = {}
            self.names: list[str] = []
            self.started: list[tuple[Config, list[str]]] = []

        def start(self, config, overrides):
            self.names.append(config.run_name)
            self.started.append((config, overrides))
            code = self.codes.get(len(self.names), 0)
            if code == 0:
                finish(config, 3.5 - len(self.names) / 10)
            return code

    fake = Runs()
    monkeypatch.setattr(remote, "start_run", fake.start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    return fake


def ended(tmp_path, *arguments: str) -> tuple[Sweep, int]:
    """Run a sweep with Hydra's basic launcher, in this process; return the sweep and its exit code."""
    given = ["experiment=demo", f"runs_dir={tmp_path}", *arguments]
    sweep = read_sweep(given)
    return sweep, remote.sweep_elsewhere(sweep, given)


LEVELS = "sparsity.target=0,0.5,0.8"


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        ([LEVELS], [f"sweep/sparsity.target-{target}" for target in ("0", "0.5", "0.8")]),
        (["sweep_name=s", LEVELS], [f"s/sparsity.target-{target}" for target in ("0", "0.5", "0.8")]),
        (["sweep_name=s"], ["s/demo"]),
        (["run_name=mine"], ["mine"]),
    ],
)
def test_a_job_runs_in_the_folder_it_was_planned_for(tmp_path, runs, capsys, arguments, folders):
    sweep, code = ended(tmp_path, *arguments)
    assert runs.names == [job.name for job in sweep.jobs] == folders
    assert [config for config, _ in runs.started] == [job.config for job in sweep.jobs]
    assert all(composed("train", overrides) == config for config, overrides in runs.started)
    assert code == 0
    assert capsys.readouterr().out.count("\n| ") == 1 + len(folders)


def test_what_is_finished_is_not_submitted_again(tmp_path, runs, capsys):
    runs.codes = {2: 3}
    assert ended(tmp_path, LEVELS)[1] == 1
    assert "sparsity.target-0.5 (exit code 3)" in capsys.readouterr().err
    assert ended(tmp_path, LEVELS)[1] == 0
    assert runs.names[3:] == ["sweep/sparsity.target-0.5"]
    assert ended(tmp_path, LEVELS)[1] == 0
    assert len(runs.names) == 4


def test_with_overwrite_the_older_summary_of_a_failed_job_does_not_count(tmp_path, runs, capsys):
    ended(tmp_path, LEVELS)
    runs.codes = {5: 2}
    assert ended(tmp_path, LEVELS, "overwrite=true")[1] == 1
    said = capsys.readouterr().err
    assert "1 of the sweep's 3 jobs did not finish" in said
    assert "sparsity.target-0.5 (exit code 2)" in said


def test_without_slurm_the_launcher_says_so_in_one_line(tmp_path, runs, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')

    monkeypatch.setattr(remote, "launched", refuse)
    assert ended(tmp_path, LEVELS)[1] == 1
    said = capsys.readouterr().err
    assert 'error: basic: Could not detect "srun"' in said
    assert said.count("(not finished)") == 3


def test_a_requeued_job_with_overwrite_that_has_ended_is_finished(tmp_path, monkeypatch):
    (job,) = read_sweep(["experiment=demo", f"runs_dir={tmp_path}", "overwrite=true"]).jobs
    finish(job.config, 3.0)
    plan = plan_run(job.config, 2)
    assert finished_job(job, plan) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert finished_job(job, plan) is not None


def searched(tmp_path, *arguments: str) -> int:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'sparsellm[search]'")
    return ended(tmp_path, "sweep=optuna_window", "hydra.sweeper.n_trials=3", *arguments)[1]


@pytest.mark.cluster
def test_a_trial_is_named_by_what_the_search_varies(tmp_path, runs, capsys):
    assert searched(tmp_path, "batch_size=32") == 0
    assert len(set(runs.names)) == 3
    for name in runs.names:
        folder, _, values = name.partition("/")
        assert folder == "sweep"
        keys = [part.rpartition("-")[0] for part in values.replace("_rate", " rate").split("_")]
        assert keys == ["optim.learning rate", "sparsity.window.end", "sparsity.window.start"]
    assert f"best     {runs.names[2].split('/')[1]}: held-out loss 3.2000" in capsys.readouterr().out


@pytest.mark.cluster
@pytest.mark.parametrize("code", [75, -signal.SIGINT, -signal.SIGTERM])
def test_a_trial_that_is_asked_to_stop_ends_the_search_with_75(tmp_path, runs, capsys, code):
    runs.codes = {2: code}
    assert searched(tmp_path) == 75
    assert len(runs.names) == 2
    assert "best     " in capsys.readouterr().out


@pytest.mark.cluster
def test_a_failed_trial_does_not_end_the_search_and_none_finished_is_one_sentence(tmp_path, runs, capsys):
    runs.codes = {1: 1, 2: 1, 3: 2}
    assert searched(tmp_path) == 1
    assert len(runs.names) == 3
    assert "no trial of" in capsys.readouterr().err


@pytest.mark.cluster
def test_a_dry_search_prints_one_command_and_runs_nothing(tmp_path, runs, capsys):
    assert searched(tmp_path, "dry_run=true", "sweep_name=s") == 0
    assert runs.names == []
    (command,) = capsys.readouterr().out.splitlines()
    assert command.startswith("accelerate launch ")
    assert command.endswith("sweep=optuna_window sweep_name=s")
