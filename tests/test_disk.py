"""A full or read-only disk when a checkpoint is saved: the previous one stays, and the error says what was needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import ROOT, quiet_environment
from tests.test_checkpoint import ALONE, write_trainer_state
from tests.test_directory import config_of
from train.checkpoints import layout
from train.checkpoints.contents import Pieces
from train.checkpoints.write import Checkpoint, write_checkpoint
from train.faults.stop import RunStopped
from train.record.directory import RunDirectory


def save(root: Path, step: int, num_weights: int) -> str:
    """Save a checkpoint of `num_weights`, and return the error with which this ends, or an empty string."""
    tensors = {"model/w": torch.ones(num_weights, 1)}
    try:
        write_checkpoint(
            Checkpoint(root, step, ALONE, tensors, Pieces([0], {"w": num_weights}), {}, write_trainer_state)
        )
    except RunStopped as stopped:
        return str(stopped)
    return ""


def main(folder: Path) -> None:
    """Print the errors of saving on a disk of 256 KiB when it is full and when it is read-only; a mount namespace holds it."""
    root = folder / "runs" / "tiny" / "checkpoints"
    root.mkdir(parents=True)
    found: dict[str, Any] = {"small": save(root, 5, 1000), "large": save(root, 10, 100_000)}
    found["left"] = sorted(path.name for path in root.iterdir())
    found["damage"] = layout.damage(layout.folder_of(root, 5))
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    found["read-only"] = save(root, 15, 1000)
    for name in ("tiny", "new"):
        try:
            RunDirectory(folder / "runs" / name).claim(config_of(folder), 0)
        except OSError as error:
            from conf.cli import sentence

            found[name] = sentence(error)
    found["still left"] = sorted(path.name for path in root.iterdir())
    print("\nFOUND " + json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("disk")
    mount = f"mount -t tmpfs -o size=256k tmpfs {folder}"
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    probe = [*inside, mount]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs `unshare --mount` and tmpfs, which this machine does not allow")
    command = f"{mount} && exec {sys.executable} -m tests.test_disk {folder}"
    done = subprocess.run(
        [*inside, command],
        cwd=ROOT,
        env=quiet_environment({}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("FOUND ")[2])


def test_a_full_disk_keeps_the_checkpoint_before_and_says_how_much_was_needed(found):
    assert found["small"] == ""
    needed = int(found["large"].partition("it takes ")[2].partition(" bytes")[0].replace(",", ""))
    assert 400_000 < needed < 401_000
    assert "No space left on device" in found["large"]
    assert "free some space" in found["large"]
    assert "checkpoint-5 is complete, rerun the same command to resume" in found["large"]
    assert found["left"] == ["checkpoint-5"]
    assert found["damage"] is None


def test_a_disk_that_became_read_only_is_said_and_nothing_is_lost(found):
    assert "checkpoint-15 could not be saved" in found["read-only"]
    assert "Read-only file system" in found["read-only"]
    assert "checkpoint-5 is complete" in found["read-only"]
    assert found["still left"] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["tiny", "new"])
def test_a_run_on_a_read_only_disk_is_refused_before_it_starts(found, name):
    assert "Read-only file system" in found[name]
    assert "choose another runs_dir" in found[name]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
