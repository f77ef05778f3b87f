"""Checkpoints written in the background: the same bytes, visible only when complete, one at a time, no error lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from conf.compose import composed
from launch.command import accelerate_command
from tests.distributed import run_ranks
from tests.interrupted import STEPS, interrupted, records_of, tensors_of
from tests.processes import launched
from tests.small_trainer import small_trainer
from tests.test_checkpoint import ALONE, world_here, write_trainer_state
from train.checkpoints import layout, write
from train.checkpoints.background import BackgroundWriter
from train.checkpoints.contents import Pieces
from train.checkpoints.write import Checkpoint, write_checkpoint
from train.distributed import World
from train.faults.stop import RunStopped

ROWS = 40
NO_MORE_SAVES = 300
"""The number of steps of a run that saves only after steps 10 and 20."""


class Gate:
    """A gate that holds every file of a checkpoint back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        inner = write.write_tensors

        def held(*args: Any) -> str:
            self.reached.set()
            assert self.opened.wait(60)
            return inner(*args)

        monkeypatch.setattr(write, "write_tensors", held)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


def save(save_: Callable[..., Any], root: Path, step: int, weight: torch.Tensor, world: World = ALONE) -> None:
    """Write a checkpoint of `weight`, with an equal part of its rows on each rank."""
    size = ROWS // world.size
    pieces = Pieces(list(range(world.size)), {"w": size})
    tensors = {"model/w": weight[world.rank * size : (world.rank + 1) * size]}
    state = {"shapes": {"w": list(weight.shape)}, "carried": {"a": [1, 2]}}
    after = lambda: layout.remove_old(root, 1, step)  # noqa: E731
    save_(Checkpoint(root, step, world, tensors, pieces, state, write_trainer_state, after=after))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_ranks_write_the_bytes_of_a_synchronous_checkpoint(tmp_path):
    run_ranks(save_both_ways, 2, tmp_path)
    expected, found = (files_of(layout.folder_of(tmp_path / kind, 5)) for kind in ("now", "later"))
    assert found == expected
    assert len(found) == 5
    assert layout.damage(layout.folder_of(tmp_path / "later", 5)) is None


def save_both_ways(root: Path) -> None:
    world = world_here()
    weight = torch.arange(ROWS * 3.0).view(ROWS, 3)
    save(write_checkpoint, root / "now", 5, weight, world)
    writer = BackgroundWriter(world, 60)
    save(writer.write_checkpoint, root / "later", 5, weight, world)
    writer.wait()


def test_a_checkpoint_holds_the_weights_of_its_step_though_training_went_on(tmp_path, gate):
    weight, writer = torch.zeros(ROWS, 2), BackgroundWriter(ALONE, 60)
    save(writer.write_checkpoint, tmp_path, 5, weight)
    weight += 1
    gate.opened.set()
    writer.wait()
    assert load_file(layout.folder_of(tmp_path, 5) / layout.rank_file(0))["model/w"].count_nonzero() == 0
    save(writer.write_checkpoint, tmp_path, 10, weight)
    writer.wait()
    assert load_file(layout.folder_of(tmp_path, 10) / layout.rank_file(0))["model/w"].sum() == 2 * ROWS


def test_it_is_visible_when_it_is_whole_and_only_then_is_the_one_before_removed(tmp_path, gate):
    writer = BackgroundWriter(ALONE, 60)
    save(write_checkpoint_at_once(gate), tmp_path, 5, torch.zeros(ROWS, 2))
    gate.opened.clear()
    gate.reached.clear()
    save(writer.write_checkpoint, tmp_path, 10, torch.zeros(ROWS, 2))
    assert gate.reached.wait(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-10.tmp", "checkpoint-5"]
    gate.opened.set()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def write_checkpoint_at_once(gate: Gate) -> Callable[..., Any]:
    gate.opened.set()
    return write_checkpoint


def test_the_next_save_waits_for_the_one_in_flight(tmp_path, gate):
    writer, weight = BackgroundWriter(ALONE, 60), torch.zeros(ROWS, 2)
    save(writer.write_checkpoint, tmp_path, 5, weight)
    assert gate.reached.wait(60)
    second = threading.Thread(target=save, args=(writer.write_checkpoint, tmp_path, 10, weight))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-5.tmp"]
    gate.opened.set()
    second.join(60)
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_rank_without_room_is_noticed_by_all_and_the_checkpoint_before_stays(tmp_path):
    found = run_ranks(fail_on_the_second_rank, 2, tmp_path)
    assert found[0] == found[1]
    failed, sentence, again = found[0]
    assert (failed, again) == (True, "")
    assert "checkpoint-10 could not be saved, it takes" in sentence
    assert "File too large" in sentence
    assert "checkpoint-5 is complete" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15"]


def fail_on_the_second_rank(root: Path) -> tuple[bool, str, str]:
    world = world_here()
    writer, weight = BackgroundWriter(world, 60), torch.zeros(ROWS, 3)
    save(writer.write_checkpoint, root, 5, weight, world)
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    save(writer.write_checkpoint, root, 10, weight, world)
    sentence = ""
    try:
        writer._thread.join()
        failed = writer.has_failed()
        writer.wait()
    except RunStopped as stopped:
        sentence = str(stopped)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    save(writer.write_checkpoint, root, 15, weight, world)
    writer.wait()
    return failed, sentence, ""


def test_a_disk_that_is_full_ends_the_run_within_steps_and_not_at_the_next_save(tmp_path):
    stopped, step, left = run_ranks(train_on_a_full_disk, 2, tmp_path)[0]
    assert "checkpoint-20 could not be saved" in stopped
    assert "No space left on device" in stopped
    assert "checkpoint-10 is complete, rerun the same command to resume" in stopped
    assert 20 <= step < NO_MORE_SAVES
    assert left == ["checkpoint-10"]


class SaveTwice(TrainerCallback):
    """A callback that saves twice, so that no later save could raise the error."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step in (10, 20)


def train_on_a_full_disk(folder: Path) -> tuple[str, int, list[str]]:
    from train.distributed import join_world

    world = world_here()
    inner, calls = write.write_tensors, [0]

    def full_later(*args: Any) -> str:
        calls[0] += 1
        if calls[0] == 2 and world.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return inner(*args)

    write.write_tensors = full_later
    trainer = small_trainer(
        folder, world=join_world(60), max_steps=NO_MORE_SAVES, save_total_limit=5, logging_steps=NO_MORE_SAVES,
        async_save=True,
    )  # fmt: skip
    trainer.add_callback(SaveTwice())
    try:
        trainer.train()
    except RunStopped as stopped:
        return str(stopped), trainer.state.global_step, sorted(path.name for path in folder.iterdir())
    raise AssertionError("the run did not stop")


@pytest.fixture(scope="module")
def killed(folder, whole) -> dict[str, Any]:
    """Run like `whole`, but with saves in the background: kill it in a save, ask it to stop in another, and finish it."""
    run_dir, found = folder / "runs" / "background", {}
    command = interrupted(folder, "background", "logger=none", "trainer.async_save=true")
    process = accelerate_command(composed("train", command), [], gpus=0)
    slow = [*process[: process.index("train")], "tests.slow_saves"]
    half = run_dir / "checkpoints" / ".checkpoint-14.tmp" / "rank-00000.safetensors"
    with launched(command, run_dir, slow) as run:
        run.wait_until(half.exists)
        run.kill_all()
    found["after the kill"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    found["damage"] = layout.damage(run_dir / "checkpoints" / "checkpoint-7")
    with launched(command, run_dir, slow) as run:
        run.wait_until((half.parents[1] / ".checkpoint-21.tmp").exists)
        found["resumed"] = "resumed from" in run.stdout and "checkpoint-7" in run.stdout
        run.process.send_signal(signal.SIGTERM)
        found["code"], found["words"] = run.wait(), run.stderr
    newest = layout.checkpoints(run_dir / "checkpoints")[0]
    found["preempted"] = (layout.step_of(newest), layout.damage(newest))
    found["left"] = [path.name for path in (run_dir / "checkpoints").glob(".*")]
    with launched(command, run_dir) as run:
        found["end"] = run.wait()
        found["said"] = run.stdout
    return {**found, "run_dir": run_dir}


@pytest.mark.timeout(900)
def test_killed_in_a_save_the_checkpoint_before_is_whole_and_the_half_is_not_taken_for_one(killed):
    assert killed["after the kill"] == [".checkpoint-14.tmp", "checkpoint-7"]
    assert killed["damage"] is None
    assert killed["resumed"]


def test_asked_to_end_it_waits_until_its_last_checkpoint_is_whole(killed):
    # Plain `accelerate launch` exits with the code of torch's agent.
    assert killed["code"] != 0
    assert "asked to stop and has saved a checkpoint" in killed["words"]
    step, damage = killed["preempted"]
    assert step >= 21
    assert damage is None
    assert killed["left"] == []
    assert f"checkpoint-{step}" in killed["said"]


def test_interrupted_twice_it_ends_with_the_bits_of_a_run_that_saved_at_once(killed, whole):
    run_dir = killed["run_dir"]
    assert killed["end"] == 0
    assert records_of(run_dir) == records_of(whole)
    for pattern in ("model/*.safetensors", f"checkpoints/checkpoint-{STEPS}/rank-*.safetensors"):
        found, expected = tensors_of(run_dir, pattern), tensors_of(whole, pattern)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["checkpoint-56", "checkpoint-60"]
    states = [
        json.loads((run / "checkpoints" / f"checkpoint-{STEPS}" / layout.STATE).read_text()) for run in (run_dir, whole)
    ]
    for state in states:
        del state["train_seconds"]
    assert states[0] == states[1]
