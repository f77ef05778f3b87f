"""The start of a branch: what is refused and with which remedy, and a checkpoint that vanishes or an interruption meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from conf.compose import composed
from conf.schema import Config
from eval.runs.page.page import choices_of
from eval.runs.run import Run
from tests.ranks_of_a_run import train_on_ranks
from tests.test_branch import command
from tests.tiny_run import tiny, write_text
from train import branch as branches
from train.branch import CheckpointGone, begin_branch, take_over_checkpoint, take_over_records
from train.checkpoints import layout
from train.checkpoints.branch import with_past
from train.model.initial_check import check_start
from train.plan.branch import Branch, public_branch_words
from train.plan.forecast import forecast
from train.plan.run import RunPlan, plan_run
from train.record.directory import RunDirectory
from train.record.metrics import Recorder
from train.speed.throughput import StepClock

pytestmark = pytest.mark.timeout(600)
CLOCK = StepClock(torch.device("cpu"), is_read=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a text, and a run on it that is 50 % sparse from step 6 on, with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("start")
    write_text(folder / "text.jsonl")
    train_on_ranks(1, command(folder, "parent"))
    return folder


def planned(folder: Path, *changes: str) -> tuple[Config, RunPlan]:
    config = composed("train", command(folder, "new", *changes))
    return config, plan_run(config, 1)


def copied(folder: Path, name: str) -> Path:
    """Copy the run, to damage the copy."""
    return shutil.copytree(folder / "runs" / "parent", folder / "runs" / name)


@pytest.mark.parametrize(
    ("point", "changes", "words"),
    [
        ("@8", ["init_from=gpt2"], r"init_from was None in that run and is gpt2 in this one.* set init_from=null"),
        ("@8", ["sparsity.update=ste", "sparsity.moves.every=2"], r"update=ste trains them: use sparsity.update=shrink"),
        ("@8", ["sparsity.update=rigl", "sparsity.target=0.6", "sparsity.window.start=9", "sparsity.window.end=10",
                "sparsity.window.every=1", "sparsity.moves.every=2"], r"with sparsity.update=rigl the others would return"),
        ("@8", ["sparsity.score=saliency", "sparsity.target=0.8", "sparsity.window.start=8", "sparsity.window.end=10"],
         r"has not kept the gradient of step 7.* begin the window at step 9 or later"),
        ("@8", ["optim=wsd", "optim.decay_steps=6"], r"decay begins at step 6.* set optim.decay_steps to at most 4"),
        ("@8", ["data.max_documents=300"], r"data.max_documents and tokenizer=train .* set tokenizer=.*tokenizers/"),
        ("/checkpoints/checkpoint-8", [], r"names no run of sparsellm but a checkpoint: write RUN@STEP"),
    ],
)  # fmt: skip
def test_a_change_that_cannot_be_is_refused_with_the_remedy(folder, point, changes, words):
    config, plan = planned(folder, f"branch_from={folder}/runs/parent{point}", *changes)
    with pytest.raises(ValueError, match=words):
        check_start(config, plan, [])


def test_a_damaged_or_foreign_run_is_refused_in_a_sentence(folder):
    garbled = copied(folder, "garbled")
    (garbled / "config.yaml").write_text("a: [")
    state = copied(folder, "state") / "checkpoints" / "checkpoint-12" / "state.json"
    state.write_text("{")
    other = copied(folder, "other") / "checkpoints" / "checkpoint-12" / "state.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "format": 1}))
    (folder / "runs" / "foreign" / "checkpoint-4").mkdir(parents=True)
    for name, words in (
        ("garbled", r"config.yaml is garbled or from another version"),
        ("state", r"state.json is garbled: branch from another step"),
        ("other", r"has format 1, but this version reads 2"),
        ("foreign", r"the checkpoints of another Trainer: start a new run with init_from="),
    ):
        config, plan = planned(folder, f"branch_from={name}", "trainer.max_steps=16")
        with pytest.raises(ValueError, match=words):
            check_start(config, plan, [])


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> tuple[Branch | None, RunDirectory]:
    """Claim the new run's folder and begin the branch, as a run does after preparing its data."""
    monkeypatch.setattr(branches, "check_data", lambda *_: None)
    config, plan = planned(folder, *changes)
    directory = RunDirectory(plan.run_dir)
    directory.claim(config, 0)
    state = json.loads((folder / "runs" / "parent" / "checkpoints" / "checkpoint-4" / "state.json").read_text())
    try:
        return begin_branch(config, plan, directory, "", state["carried"]["tokenizer"]), directory
    finally:
        directory._lock.release()


def test_an_interrupted_start_is_started_over(folder, monkeypatch):
    arguments = [f"branch_from={folder}/runs/parent@8", "run_name=twice"]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(branches, "take_over_records", fail)
        with pytest.raises(KeyboardInterrupt):
            begun(folder, monkeypatch, *arguments)
    run = folder / "runs" / "twice"
    assert (run / "checkpoints" / "checkpoint-8").is_dir()
    assert not (run / "config.yaml").exists()
    branch, directory = begun(folder, monkeypatch, *arguments)
    assert branch is not None
    assert branch.step == 8
    assert len(directory.metrics.read_text().splitlines()) == 8
    # Another command in this folder would not find half of a branch either.
    (run / "config.yaml").unlink()
    assert begun(folder, monkeypatch, "run_name=twice")[0] is None
    assert not (run / "branch.json").exists()
    assert not (run / "checkpoints").exists()


def test_the_newest_checkpoint_is_looked_for_again_if_a_live_run_removes_it(folder, monkeypatch):
    live = copied(folder, "live")
    take_over = branches.take_over_checkpoint

    def remove_first(source: Path, checkpoints: Path) -> Path:
        if source.name == "checkpoint-12":
            shutil.rmtree(source)
        return take_over(source, checkpoints)

    monkeypatch.setattr(branches, "take_over_checkpoint", remove_first)
    branch, _ = begun(folder, monkeypatch, f"branch_from={live}", "trainer.max_steps=16", "run_name=newest")
    assert branch is not None
    assert branch.step == 8
    shutil.copytree(folder / "runs/parent/checkpoints/checkpoint-12", live / "checkpoints/checkpoint-12")
    with pytest.raises(CheckpointGone, match="was removed while it was being copied: branch from another step"):
        begun(folder, monkeypatch, f"branch_from={live}@12", "trainer.max_steps=16", "run_name=gone")


def test_files_are_linked_or_copied_and_a_damaged_checkpoint_is_refused(folder, tmp_path, monkeypatch):
    source = folder / "runs" / "parent" / "checkpoints" / "checkpoint-4"
    linked = take_over_checkpoint(source, tmp_path / "a")
    assert all(os.path.samefile(path, linked / path.name) for path in source.iterdir())

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copy = take_over_checkpoint(source, tmp_path / "b")
    assert not any(os.path.samefile(path, copy / path.name) for path in source.iterdir())
    assert layout.damage(copy) is None
    with open(copy / "rank-00000.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"is damaged \(rank-00000.safetensors does not have the checksum"):
        take_over_checkpoint(copy, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def test_records_end_at_the_branch_and_a_garbled_line_is_named(tmp_path):
    source = tmp_path / "metrics.jsonl"
    source.write_text('{"train/global_step": 4}\n{"train/global_step": 5}\n{"train/glo')
    take_over_records(source, tmp_path / "own.jsonl", 4)
    assert (tmp_path / "own.jsonl").read_text() == '{"train/global_step": 4}\n'
    source.write_text("{\n")
    with pytest.raises(ValueError, match="has a line that is not a record"):
        take_over_records(source, tmp_path / "own.jsonl", 4)


def test_a_plan_counts_the_density_of_the_whole_run_and_the_time_of_the_branch_only(folder):
    config, plan = planned(folder, f"branch_from={folder}/runs/parent@8", "trainer.max_steps=16", "sparsity.target=0")
    found = forecast(config, with_past(config, plan), composed("plan", []))
    # Steps 0 and 1 are dense, and two each have 0.5 to the power of 1/3 and 2/3; the rest are at one half.
    expected = (2 + 2 * 0.5 ** (1 / 3) + 2 * 0.5 ** (2 / 3) + 10 * 0.5) / 16
    assert found["average_density"] == pytest.approx(expected, abs=1e-4)
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert found["branch"]["steps"] == 8
    assert found["branch"]["tokens"] == 8 * 256
    assert found["compute"]["days"] * 86_400 == pytest.approx(8 * found["compute"]["seconds_per_step"])


def test_a_card_shows_no_folders_of_this_machine():
    branch = Branch("/home/me/runs/a", 8, "/home/me/runs/a", ("data.path was ../x/web.jsonl, is /data/b.jsonl",), False)
    assert public_branch_words(branch) == "branched from a at step 8: data.path was web.jsonl, is b.jsonl"
    hub = replace(branch, changes=("data.name was allenai/c4, is HuggingFaceFW/fineweb",))
    assert public_branch_words(hub).endswith("data.name was allenai/c4, is HuggingFaceFW/fineweb")


class FakeWandb:
    """A wandb run that keeps what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, int]] = []

    def log(self, record: dict[str, Any], step: int, commit: bool) -> None:
        self.logged.append((record["train/global_step"], step))


def test_a_new_wandb_run_of_a_branch_gets_the_records_before_it(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"train/global_step": 4, "train/loss": 2.0}\n{"train/global_step": 8, "train/loss": 1.0}\n')
    config = composed("train", tiny(tmp_path))
    for is_new, expected in ((True, [(4, 0), (8, 1), (9, 2)]), (False, [(9, 2)])):
        fake = FakeWandb()
        recorder = Recorder(plan_run(config, 1), None, metrics, fake, CLOCK, cast(Any, None), is_new)
        recorder.write({"train/global_step": 9, "train/loss": 0.5})
        assert fake.logged == expected
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))


def test_a_report_says_where_a_run_branched():
    run = Run("a", Path("a"), (), {"choices": ["x"], "branch": {"run": "trunk", "step": 80}}, True, "finished")
    assert choices_of(run) == ["branched from trunk at step 80", "x"]
