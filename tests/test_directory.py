"""A run's folder: to which run it belongs, what it may contain, and what `resume` and `overwrite` mean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from conf.cli import sentence
from conf.compose import composed
from conf.schema import Config
from launch.run import start_run
from tests.test_run import tiny
from train.record.directory import RunDirectory


def config_of(folder: Path, *overrides: str) -> Config:
    config = composed("train", tiny(folder, *overrides))
    assert isinstance(config, Config)
    return config


def begun(folder: Path, *overrides: str) -> RunDirectory:
    """Make the folder of a run that has begun and is unfinished."""
    directory = RunDirectory(folder / "runs" / "tiny")
    directory.claim(config_of(folder, *overrides), 0)
    directory.begin(config_of(folder, *overrides))
    directory._lock.release()
    return directory


def test_a_folder_in_use_by_a_live_process_is_refused_even_to_overwrite(tmp_path):
    directory = begun(tmp_path)
    with FileLock(directory.path / ".lock"), pytest.raises(ValueError, match="in use by a live process"):
        directory.claim(config_of(tmp_path, "overwrite=true"), 0)
    assert directory.config.exists()


def test_a_second_launch_is_refused_before_it_starts_processes(tmp_path, monkeypatch):
    directory, started = begun(tmp_path), []
    monkeypatch.setattr("train.record.directory.LAUNCH_PATIENCE_S", 0.1)
    monkeypatch.setattr("launch.run.run_child", lambda *args: started.append(args) or 0)
    overrides = tiny(tmp_path, "logger=none")
    with FileLock(directory.path / ".lock"), pytest.raises(ValueError, match="tiny is in use by a live process: wait"):
        start_run(config_of(tmp_path, "logger=none"), overrides)
    assert started == []
    # The other machines of a run may start after rank 0 has claimed the folder.
    meeting = ("launch.num_machines=2", "launch.main_process_ip=node0", "launch.main_process_port=29500")
    second = config_of(tmp_path, "logger=none", *meeting, "launch.machine_rank=1", "overwrite=true")
    with FileLock(directory.path / ".lock"):
        assert start_run(second, overrides) == 0
    assert start_run(config_of(tmp_path, "logger=none", "overwrite=true"), overrides) == 0
    assert len(started) == 2


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that do not belong to a run"):
        RunDirectory(folder).claim(config_of(tmp_path), 0)
    RunDirectory(folder).claim(config_of(tmp_path, "overwrite=true"), 0)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_disk_without_room_is_refused_with_both_figures(tmp_path):
    with pytest.raises(ValueError, match=r"GB free, but the run needs 1000000\.00 GB.*another runs_dir"):
        RunDirectory(tmp_path / "runs" / "tiny").claim(config_of(tmp_path), 10**15)


def test_a_runs_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="Not a directory") as refusal:
        RunDirectory(tmp_path / "runs" / "tiny").claim(config_of(tmp_path), 0)
    assert str(tmp_path / "runs") in sentence(refusal.value)


def test_a_runs_dir_without_permission_is_refused(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    # The config is read while this is still the user who owns the checkout.
    config, user = config_of(tmp_path), os.geteuid()
    try:
        if user == 0:
            # Root may write anywhere.
            os.seteuid(65534)
        with pytest.raises(OSError, match="Permission denied") as refusal:
            RunDirectory(tmp_path / "runs" / "tiny").claim(config, 0)
    finally:
        os.seteuid(user)
    assert "choose a runs_dir and data.cache_dir that you may write to" in sentence(refusal.value)


def test_resume_never_refuses_an_unfinished_run_and_must_a_folder_without_a_checkpoint(tmp_path):
    directory = begun(tmp_path)
    with pytest.raises(ValueError, match=r"unfinished run, but resume=never: set overwrite=true"):
        directory.claim(config_of(tmp_path, "resume=never"), 0)
    directory._lock.release()
    with pytest.raises(ValueError, match="no checkpoint to resume from, but resume=must"):
        directory.claim(config_of(tmp_path, "resume=must"), 0)
    directory._lock.release()
    (directory.checkpoints / "checkpoint-5").mkdir(parents=True)
    assert directory.claim(config_of(tmp_path, "resume=must"), 0) is None
    directory._lock.release()
    directory.claim(config_of(tmp_path, "resume=never", "overwrite=true"), 0)
    assert not directory.checkpoints.exists()


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_by_the_agent_or_by_slurm_goes_on_whatever_the_command_said(tmp_path, monkeypatch, variable):
    """They repeat the command, and even with overwrite=true it must not start again."""
    directory = begun(tmp_path)
    monkeypatch.setenv(variable, "1")
    assert directory.claim(config_of(tmp_path, "resume=never", "overwrite=true"), 0) is None
    assert directory.config.exists()


def test_another_config_is_refused_key_by_key_and_what_is_no_part_of_a_run_is_not(tmp_path):
    directory = begun(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.weight_decay was 0\.1, is 0\.2.*overwrite=true"):
        directory.claim(config_of(tmp_path, "optim.weight_decay=0.2"), 0)
    directory._lock.release()
    assert directory.claim(config_of(tmp_path, "trainer.ddp_timeout=7", "launch.max_restarts=3"), 0) is None


def test_a_key_that_a_later_version_brought_does_not_make_another_run(tmp_path):
    directory = begun(tmp_path)
    before = OmegaConf.load(directory.config)
    del before.sparsity.pattern
    OmegaConf.save(before, directory.config)
    assert directory.finished(config_of(tmp_path)) is None
    with pytest.raises(ValueError, match=r"sparsity\.pattern was unstructured, is 2:4"):
        directory.finished(config_of(tmp_path, "sparsity.pattern='2:4'", "sparsity.target=0.5"))
