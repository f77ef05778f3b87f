"""A run that was killed resumes as if nothing had happened: the same records and the same model, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import run_command
from tests.interrupted import STEPS, interrupted, one_error, records_of, tensors_of, unfinished
from tests.processes import launched
from tests.wandb_file import read_history
from train.checkpoints import layout
from train.checkpoints.read import CheckpointReader

# A module's first test waits for several launches.
pytestmark = pytest.mark.timeout(900)
SECRETS = {
    "WANDB_API_KEY": "f00dfeed" * 5,
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "SOME_PASSWORD": "correct-horse-battery-staple",
}
KILLS = {
    "before the window": (12, "trainer.save_steps=7", (7, 14)),
    "in the window, in the middle of an epoch": (30, "trainer.save_steps=7", (28, 35)),
    "after the window, at the end of an epoch": (49, "trainer.save_steps=11", (44, 55)),
}
"""For each kill: its step, how often checkpoints are saved until then, and the steps from which the run may resume.

An epoch has 11 steps of three micro-batches, and the window is steps 20 to 40.
"""


def copy_run(run_dir: Path, name: str) -> None:
    """Copy the run, as it is on the disk, under another name."""
    copy = run_dir.with_name(name)
    shutil.copytree(run_dir, copy)
    config = (copy / "config.yaml").read_text().replace(f"run_name: {run_dir.name}", f"run_name: {name}")
    (copy / "config.yaml").write_text(config)


@pytest.fixture(scope="module")
def resumes() -> dict[str, int]:
    """Return a table for the steps from which the run resumed after each of KILLS; `killed` fills it."""
    return {}


@pytest.fixture(scope="module")
def killed(folder, whole, resumes) -> Path:
    """Do the same run, killing it with SIGKILL before, in and after the prune window and starting it again each time."""
    run_dir = folder / "runs" / "killed"
    command = interrupted(folder, "killed")
    for moment, (step, how_often, _) in KILLS.items():
        with launched([*command, how_often], run_dir, **SECRETS) as run:
            run.wait_for_step(step)
            run.kill_all()
        resumes[moment] = layout.step_of(layout.checkpoints(run_dir / "checkpoints")[0])
        if moment.startswith("in the window"):
            copy_run(run_dir, "resharded")
    with open(run_dir / "metrics.jsonl", "a") as metrics:
        metrics.write('{"train/global_step": 51, "train/lo')
    with launched(command, run_dir, **SECRETS) as run:
        assert run.wait() == 0, run.stderr[-3000:]
        assert f"resumed from {run_dir}/checkpoints/checkpoint-{resumes[moment]}" in run.stdout
    return run_dir


@pytest.mark.parametrize("moment", KILLS)
def test_the_run_goes_on_from_where_it_was_meant_to(killed, resumes, moment):
    assert resumes[moment] in KILLS[moment][2]


def test_a_run_killed_three_times_writes_the_records_of_the_whole_one(whole, killed):
    assert records_of(killed) == records_of(whole)
    steps = [record["train/global_step"] for record in records_of(killed)]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


def test_its_model_moments_and_masks_are_the_same_to_the_last_bit(whole, killed):
    for pattern in ("model/*.safetensors", f"checkpoints/checkpoint-{STEPS}/rank-*.safetensors"):
        found, expected = tensors_of(killed, pattern), tensors_of(whole, pattern)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert any(":mask/" in name for name in expected)
    assert any(":optim.exp_avg_sq/" in name for name in expected)


def test_its_summary_is_the_same_but_for_the_clock(whole, killed):
    found, expected = (json.loads((run / "summary.json").read_text()) for run in (killed, whole))
    for key in expected.keys() - {"run_name", "seconds", "train_seconds", "tokens_per_second"}:
        assert found[key] == expected[key], key


def test_its_wandb_runs_have_one_id_and_each_step_once(killed):
    files = sorted(killed.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == len(KILLS) + 1
    assert {file.stem for file in files} == {f"run-{(killed / 'wandb' / 'id.txt').read_text().strip()}"}
    history = [record for file in files for record in read_history(file)]
    steps = [record["train/global_step"] for record in history]
    assert steps == sorted(set(steps))
    # wandb's own count continues too: it is the record's place in metrics.jsonl.
    logged = [record["train/global_step"] for record in records_of(killed)]
    assert [record["_step"] for record in history] == [logged.index(step) for step in steps]


def test_the_newest_checkpoints_are_kept_and_nothing_half_written(killed):
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["checkpoint-56", "checkpoint-60"]


def test_no_file_of_a_run_is_a_pickle(killed):
    for path in killed.rglob("*"):
        assert path.suffix not in (".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata")
        assert not path.is_file() or b"\x80\x04\x95" not in path.read_bytes()[:4096]


def test_no_file_or_line_of_a_run_holds_a_token_or_key_of_the_environment(killed):
    files = [path for path in killed.rglob("*") if path.is_file()]
    files += [killed.with_name(f"killed.{kind}") for kind in ("out", "err")]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        data = path.read_bytes()
        assert [name for name, secret in SECRETS.items() if secret.encode() in data] == [], path


def test_data_that_changed_since_the_run_began_is_noticed_by_the_same_command(folder, whole, tmp_path):
    run_dir = unfinished(folder, whole, "changed")
    shutil.move(run_dir, tmp_path / "runs" / "changed")
    config = tmp_path / "runs" / "changed" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder), str(tmp_path)))
    text = (folder / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(text.replace("Story 3:", "Story three:"))
    said = one_error(interrupted(tmp_path, "changed", "logger=none"))
    assert "The training data has changed since the run began" in said
    assert "overwrite=true" in said


def test_a_kill_in_the_export_is_survived_and_a_damaged_checkpoint_is_passed_over(folder, whole):
    """One rerun tests a flipped bit in the newest checkpoint, a half-written export and a half-saved checkpoint."""
    run_dir = unfinished(folder, whole, "export")
    shutil.move(run_dir / "model", run_dir / "model.tmp")
    (run_dir / "model.tmp" / "model.safetensors").write_bytes(b"half")
    newest = run_dir / "checkpoints" / f"checkpoint-{STEPS}" / "rank-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    (run_dir / "checkpoints" / ".checkpoint-57.tmp").mkdir()
    done = run_command(["launch", *interrupted(folder, "export", "logger=none")])
    assert done.returncode == 0, done.stderr[-3000:]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "rank-00001.safetensors does not have the checksum" in warnings[0]
    assert "checkpoint-56" in done.stdout
    assert tensors_of(run_dir, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")
    assert records_of(run_dir) == records_of(whole)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "checkpoint-56", "checkpoint-60", "checkpoint-60.damaged",
    ]  # fmt: skip
    assert not (run_dir / "model.tmp").exists()


def test_other_numbers_of_ranks_go_on_with_the_same_masks_and_losses(folder, whole, killed):
    """The run goes from 2 ranks to 1 in the window, then to 2 and to 3, each time from its newest checkpoint."""
    run_dir = folder / "runs" / "resharded"
    for world, last in ((1, 38), (2, 50), (3, None)):
        command = interrupted(folder, "resharded", f"launch.num_processes={world}", "logger=none")
        with launched(command, run_dir) as run:
            if last is not None:
                run.wait_for_step(last)
                run.kill_all()
            else:
                assert run.wait() == 0, run.stderr[-3000:]
        written = layout.checkpoints(run_dir / "checkpoints")[0]
        assert CheckpointReader(written).state["world_size"] == world
    found, expected = records_of(run_dir), records_of(whole)
    assert [record["train/global_step"] for record in found] == [record["train/global_step"] for record in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert mine["sparsity/density"] == theirs["sparsity/density"]
        assert mine["sparsity/average_density"] == theirs["sparsity/average_density"]
    mine, theirs = (load_file(path / "model" / "model.safetensors") for path in (run_dir, whole))
    assert all(torch.equal(mine[tensor] == 0, theirs[tensor] == 0) for tensor in theirs)
