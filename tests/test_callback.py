"""The callback in a user's Trainer script, in one process, DDP and FSDP2: as a command, and in forked ranks, to save time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsity.schedule import Geometric
from tests.commands import run_command
from tests.distributed import run_ranks
from tests.foreign_trainer import STEPS, train
from tests.wandb_file import read_history

SCHEDULE = Geometric(sparsity=0.8, start_step=2, end_step=8, every_steps=2)
WEIGHTS = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 97 * 32


def foreign(tmp_path: Path, *options: str, processes: int = 1) -> dict[str, Any]:
    """Run the script in ranks that are forked after its imports, and return its results."""
    tmp_path.mkdir(exist_ok=True)
    return run_ranks(train, processes, [str(tmp_path), *options], joined=False)[0][0]


def foreign_command(tmp_path: Path, *options: str, processes: int = 1) -> dict[str, Any]:
    """Run the script as a user would, and return its results."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    done = run_command([*launcher, "tests.foreign_trainer", str(tmp_path), *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return {**json.loads(line.removeprefix("FOUND ")), "stderr": done.stderr}


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, ["--accumulate", "2"]),
        (1, ["--bf16", "--compile"]),
        (2, ["--accumulate", "2"]),
        (2, ["--fsdp2", "--accumulate", "2"]),
        (2, ["--fsdp2", "--bf16", "--compile"]),
    ],
    ids=[
        "one process, accumulation",
        "one process, bf16, compiled",
        "DDP, accumulation",
        "FSDP2",
        "FSDP2, bf16, compiled",
    ],
)
def test_three_lines_prune_a_foreign_trainer_to_the_target(tmp_path, processes, options):
    run = foreign_command if options == ["--fsdp2", "--accumulate", "2"] else foreign
    found = run(tmp_path, "--sparsity", "0.8", *options, processes=processes)
    assert (found["zeros"], found["weights"]) == (round(0.8 * WEIGHTS), WEIGHTS)
    expected = [round((1 - SCHEDULE.density(step)) * WEIGHTS) for step in range(STEPS)]
    assert [round((1 - density) * WEIGHTS) for density in found["densities"]] == expected
    assert found["average_density"] == pytest.approx(SCHEDULE.average_density(STEPS), abs=1e-3)
    assert found["world_size"] == processes
    assert found["is_fsdp2"] == ("--fsdp2" in options)
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "FSDP2 on two ranks"])
def test_zero_sparsity_equals_no_callback_to_the_last_bit(tmp_path, processes):
    options = ["--fsdp2"] if processes > 1 else []
    with_callback = foreign(tmp_path / "a", "--sparsity", "0", *options, processes=processes)
    without = foreign(tmp_path / "b", *options, processes=processes)
    assert with_callback["losses"] == without["losses"]
    assert with_callback["digest"] == without["digest"]
    assert with_callback["zeros"] == 0


def test_a_tied_head_stays_dense_and_it_is_said(tmp_path):
    found = foreign_command(tmp_path, "--sparsity", "0.8", "--tied")
    assert "lm_head.weight shares its weight with an embedding and stays dense" in found["stderr"]
    assert found["zeros"] == round(0.8 * (WEIGHTS - 97 * 32))


def test_a_resumed_foreign_run_takes_its_masks_from_the_checkpoint(tmp_path):
    whole = foreign(tmp_path, "--sparsity", "0.8")
    checkpoint_of_the_end = tmp_path / f"checkpoint-{STEPS}"
    for file in checkpoint_of_the_end.iterdir():
        file.unlink()
    checkpoint_of_the_end.rmdir()
    resumed = foreign(tmp_path, "--sparsity", "0.8", "--resume")
    assert resumed["digest"] == whole["digest"]
    assert resumed["average_density"] == pytest.approx(whole["average_density"], abs=1e-3)


def test_a_resumed_run_without_its_zeros_is_refused(tmp_path):
    foreign(tmp_path)
    checkpoint_of_the_end = tmp_path / f"checkpoint-{STEPS}"
    for file in checkpoint_of_the_end.iterdir():
        file.unlink()
    checkpoint_of_the_end.rmdir()
    done = run_command(["tests.foreign_trainer", str(tmp_path), "--sparsity", "0.8", "--resume"], cwd=tmp_path)
    assert done.returncode != 0
    assert "The checkpoint has 0 zero weights where" in done.stderr


def test_density_reaches_a_wandb_run_that_the_trainer_started(tmp_path):
    foreign_command(tmp_path, "--sparsity", "0.8", "--wandb")
    history = read_history(next((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")))
    densities = [float(record["sparsity/density"]) for record in history if "sparsity/density" in record]
    assert len(densities) >= STEPS
    assert densities[-1] == pytest.approx(0.2, abs=1e-3)
    assert any("sparsity/average_density" in record for record in history)
