"""A run that was killed goes on as if nothing had happened: the same records, the same model, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands import run_command
from tests.processes import launched
from tests.test_callback import read_offline_history
from tests.test_run import tiny, write_text

STEPS = 60
KILLS = {"before the window": 12, "in the window": 30, "after the window": 49}


def interrupted(folder: Path, name: str, *overrides: str) -> list[str]:
    """60 steps of 17 an epoch, two micro-batches a step, pruned at steps 20 to 40; saving and logging out of step."""
    return tiny(
        folder, f"run_name={name}", f"trainer.max_steps={STEPS}", "data.max_documents=44", "trainer.save_steps=7",
        "trainer.logging_steps=3", "sparsity.window.of=steps", "sparsity.window.start=20", "sparsity.window.end=40",
        "sparsity.window.every=2", *overrides,
    )  # fmt: skip


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """The run's records, without the one figure that is a matter of time."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "train/tokens_per_second"} for record in records]


def tensors_of(run_dir: Path, pattern: str) -> dict[str, bytes]:
    """Every tensor's bytes, of all files that fit."""
    return {
        f"{path.name}:{name}": tensor.contiguous().view(-1).numpy().tobytes()
        for path in sorted(run_dir.glob(pattern))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The run that nothing happened to."""
    done = run_command(["launch", *interrupted(folder, "whole", "logger=none")])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def killed(folder, whole) -> Path:
    """The same run, killed with SIGKILL before, in and after the prune window, started again each time."""
    run_dir = folder / "runs" / "killed"
    command = interrupted(folder, "killed")
    for step in KILLS.values():
        with launched(command, run_dir) as run:
            run.wait_for_step(step)
            run.kill_all()
    with open(run_dir / "metrics.jsonl", "a") as metrics:
        metrics.write('{"train/global_step": 51, "train/lo')
    with launched(command, run_dir) as run:
        assert run.wait() == 0, run.stderr[-3000:]
    return run_dir


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
    steps = [record["train/global_step"] for file in files for record in read_offline_history(file)]
    assert steps == sorted(set(steps))


def test_the_newest_checkpoints_are_kept_and_nothing_half_written(killed):
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["checkpoint-56", "checkpoint-60"]


def test_no_file_of_a_run_is_a_pickle(killed):
    for path in killed.rglob("*"):
        assert path.suffix not in (".pt", ".pth", ".bin", ".pkl", ".distcp", ".metadata")
        assert not path.is_file() or b"\x80\x04\x95" not in path.read_bytes()[:4096]


def unfinished(folder: Path, whole: Path, name: str) -> Path:
    """A copy of the whole run as it would be had it been killed in its evaluation."""
    run_dir = folder / "runs" / name
    shutil.copytree(whole, run_dir)
    for file in ("summary.json", "report.png", "sample.txt"):
        (run_dir / file).unlink()
    config = (run_dir / "config.yaml").read_text().replace("run_name: whole", f"run_name: {name}")
    (run_dir / "config.yaml").write_text(config)
    return run_dir


def one_error(command: list[str], **options: Any) -> str:
    """The one line that `python -m launch` says is wrong."""
    done = run_command(["launch", *command, *[f"{key}={value}" for key, value in options.items()]])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return errors[0]


def test_resume_never_refuses_an_unfinished_run_and_must_an_empty_folder(folder, whole):
    unfinished(folder, whole, "never")
    refusal = one_error(interrupted(folder, "never", "logger=none", "resume=never"))
    assert "was not finished and resume=never" in refusal
    assert "overwrite=true" in refusal
    nothing = one_error(interrupted(folder, "must", "logger=none", "resume=must"))
    assert "no checkpoint to resume from and resume=must" in nothing


def test_a_kill_in_the_export_is_survived_and_a_damaged_checkpoint_is_passed_over(folder, whole):
    """One rerun for both: a flipped bit in the newest checkpoint, a half-written export and a half-saved checkpoint."""
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
