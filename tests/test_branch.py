"""A run that begins at another run's checkpoint: what it takes over, what may change, and that the other run is unchanged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import get_scheduler

from conf.compose import composed
from tests.interrupted import records_of, tensors_of
from tests.ranks_of_a_run import train_on_ranks
from tests.tiny_run import tiny, write_text
from train.arguments import training_arguments
from train.branch import check_same_tokenizer
from train.checkpoints.rates import keeps_rates, load_rates
from train.model.initial_check import check_start
from train.plan.branch import parse_branch, planned_steps, read_branch
from train.plan.run import plan_run

pytestmark = pytest.mark.timeout(900)
SPARSE = (
    "sparsity.target=0.5", "sparsity.window.start=2", "sparsity.window.end=6", "sparsity.window.every=2", "logger=none",
    "trainer.save_steps=4", "trainer.save_total_limit=3",
)  # fmt: skip
PARENT_STEPS = 12


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return tiny(folder, *SPARSE, "trainer.max_steps=12", f"run_name={name}", *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a text, and a sparse run on it with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("branch")
    write_text(folder / "text.jsonl")
    train_on_ranks(1, command(folder, "parent"))
    return folder


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def contents(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Return the hash, the time of the last change and the inode of each file, since a branch shares files by hard links."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_ino
        )
        for path in files
    }  # fmt: skip


def test_a_branch_that_changes_nothing_equals_its_parent_to_the_last_bit(folder):
    parent, child = folder / "runs" / "parent", folder / "runs" / "same"
    before = contents(parent)
    train_on_ranks(1, command(folder, "same", f"branch_from={parent}@4"))
    assert records_of(child) == records_of(parent)
    for pattern in ("model/*.safetensors", f"checkpoints/checkpoint-{PARENT_STEPS}/rank-*.safetensors"):
        found, expected = tensors_of(child, pattern), tensors_of(parent, pattern)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    mine, theirs = summary_of(child), summary_of(parent)
    assert mine.pop("branch") == {"run": "parent", "step": 4, "trunk": str(parent)}
    for key in theirs.keys() - {"run_name", "seconds", "train_seconds", "tokens_per_second"}:
        assert mine[key] == theirs[key], key
    assert contents(parent) == before


SETTINGS = {
    "rigl": (1, ("sparsity=rigl", "sparsity.window.start=0", "sparsity.window.end=0", "sparsity.window.every=null")),
    "ste": (1, ("sparsity=ste",)),
    "two-ranks": (2, ("optim=muon", "trainer.async_save=true")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_branch_equals_its_parent_under_moving_masks_and_on_two_ranks(folder, name):
    ranks, changes = SETTINGS[name]
    runs, changes = folder / "runs", (*changes, "sparsity.target=0.5")
    changes = changes if ranks > 1 else (*changes, "sparsity.moves.every=3")
    train_on_ranks(ranks, command(folder, name, *changes))
    train_on_ranks(ranks, command(folder, f"{name}-same", *changes, f"branch_from={runs}/{name}@4"))
    assert records_of(runs / f"{name}-same") == records_of(runs / name)
    pattern = f"checkpoints/checkpoint-{PARENT_STEPS}/rank-*.safetensors"
    assert tensors_of(runs / f"{name}-same", pattern) == tensors_of(runs / name, pattern)


def test_a_branch_with_another_mixture_counts_the_tokens_that_both_took(folder):
    runs, few = folder / "runs", folder / "few.jsonl"
    few.write_text("".join((folder / "text.jsonl").read_text().splitlines(keepends=True)[:300]))

    def mixture(name: str, weights: tuple[int, int], *more: str) -> list[str]:
        sources = f"[{{path:{folder}/text.jsonl,weight:{weights[0]}}},{{path:{few},weight:{weights[1]}}}]"
        own = [item for item in command(folder, name, *more) if not item.startswith(("data=", "data.path"))]
        return [*own, "data=mixture", f"data.sources={sources}", "trainer.max_steps=6", "sparsity.target=0"]

    train_on_ranks(1, mixture("seven", (7, 3)))
    state = json.loads((runs / "seven/checkpoints/checkpoint-4/state.json").read_text())
    tokenizer = f"tokenizer={state['carried']['tokenizer']}"
    train_on_ranks(1, mixture("one", (1, 999), f"branch_from={runs}/seven@4", tokenizer))
    before = {record["train/global_step"]: record for record in records_of(runs / "seven")}
    found = summary_of(runs / "one")["tokens_by_source"]
    # The last two steps of eight blocks of 32 tokens are nearly all from the second source.
    assert found["text"] - before[4]["train/tokens/text"] <= 32
    assert sum(found.values()) == 6 * 256
    assert read_branch(runs / "one").blocks == {
        name: before[4][f"train/tokens/{name}"] // 32 for name in ("text", "few")
    }


def test_a_branch_that_was_interrupted_goes_on_as_a_branch(folder):
    parent, child = folder / "runs" / "parent", folder / "runs" / "longer"
    arguments = command(
        folder, "longer", f"branch_from={parent}@8", "trainer.max_steps=14", "optim.learning_rate=0.002"
    )
    train_on_ranks(1, arguments)
    whole = shutil.copytree(child, folder / "whole")
    for name in ("summary.json", "checkpoints/checkpoint-12", "checkpoints/checkpoint-14"):
        shutil.rmtree(child / name) if (child / name).is_dir() else (child / name).unlink()
    train_on_ranks(1, arguments)
    assert records_of(child) == records_of(whole)
    assert tensors_of(child, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")
    # From its first step on, the branch has its own rate, at its place in the longer schedule.
    rates = {record["train/global_step"]: record["train/learning_rate"] for record in records_of(child)}
    assert rates[8] > 0.002 > rates[9] > rates[14] >= 0.0002


def test_a_finished_run_is_extended_and_what_changed_is_written_down(folder):
    parent, child = folder / "runs" / "parent", folder / "runs" / "extended"
    train_on_ranks(2, command(folder, "extended", f"branch_from={parent}", "trainer.max_steps=15"))
    assert summary_of(child)["steps"] == 15
    assert [record["train/global_step"] for record in records_of(child)] == list(range(1, 16))
    words = f"branched from {parent} at step 12: trainer.max_steps was 12, is 15"
    assert (child / "config.yaml").read_text().startswith(f"# {words}\n")
    # A card may be published, so it does not show where the runs are.
    card = (child / "model" / "README.md").read_text()
    assert "branched from parent at step 12: trainer.max_steps was 12, is 15" in card
    assert str(folder) not in card
    assert read_branch(child).changes == ("trainer.max_steps was 12, is 15",)


def test_masks_and_average_density_go_on_under_another_schedule(folder):
    parent, child = folder / "runs" / "parent", folder / "runs" / "sparser"
    changes = ["sparsity.target=0.8", "sparsity.window.start=8", "sparsity.window.end=11", "sparsity.window.every=1"]
    train_on_ranks(1, command(folder, "sparser", f"branch_from={parent}@8", *changes))
    found = summary_of(child)
    linear = found["linear_params"]
    assert found["nonzero_linear_params"] == linear - round(0.8 * linear)
    masks = {run: tensors_of(run, "checkpoints/checkpoint-12/rank-*.safetensors") for run in (parent, child)}
    densities = [record["sparsity/density"] for record in records_of(child)]
    # The first event of the new window would keep more weights than are left: none comes back.
    assert densities[:8] == [record["sparsity/density"] for record in records_of(parent)][:8]
    assert densities[8] == pytest.approx(0.5, abs=1e-3)
    assert found["average_density"] == pytest.approx(sum(densities) / 12, abs=1e-6)
    for name, theirs in masks[parent].items():
        if ":mask/" in name:
            assert all(mine & ~kept == 0 for mine, kept in zip(bytes(masks[child][name]), bytes(theirs), strict=True))


def test_what_does_not_fit_is_said_before_anything_starts(folder):
    parent = folder / "runs" / "parent"
    for changes, words in (
        ([f"branch_from={parent}@5"], r"has no checkpoint of step 5 \(kept: 4, 8, 12\)"),
        (["branch_from=nowhere"], "names no run"),
        ([f"branch_from={parent}@x"], "names no run of sparsellm: write RUN or RUN@STEP"),
        ([f"branch_from={parent}@8", "trainer.max_steps=8"], "begins at step 8, but the run has only 8 steps"),
        (
            [f"branch_from={parent}@8", "model.num_hidden_layers=3"],
            "model.num_hidden_layers was 2 in that run and is 3 in this one",
        ),
        ([f"branch_from={parent}@8", "optim.optim=adamw_torch"], "optim.optim was adamw_torch_fused in that run"),
        ([f"branch_from={parent}@8", "sparsity.target=0.8"], r"begin the window at step 8 or later"),
        ([f"branch_from={parent}@8", "run_name=parent", "overwrite=true"], "this run's own folder"),
    ):
        config = composed("train", command(folder, "new", *changes))
        with pytest.raises(ValueError, match=words):
            check_start(config, plan_run(config, 1), [])


def test_another_batch_or_tokenizer_is_refused(folder):
    parent = folder / "runs" / "parent"
    config = composed("train", command(folder, "new", f"branch_from={parent}@8"))
    for changes, words in (
        (["batch_size=4"], "has batch_size=8 and this run has batch_size=4.*set batch_size=8"),
        (["data.sequence_length=16"], "set data.sequence_length=32"),
    ):
        other = composed("train", command(folder, "new", f"branch_from={parent}@8", *changes))
        with pytest.raises(ValueError, match=words):
            check_start(other, plan_run(other, 1), [])
    check_same_tokenizer(config, "/cache/tokenizers/a", "/elsewhere/tokenizers/a")
    with pytest.raises(ValueError, match="set tokenizer=/cache/tokenizers/a"):
        check_same_tokenizer(config, "/cache/tokenizers/a", "/cache/tokenizers/b")


def test_a_branch_point_is_a_run_and_a_step():
    assert parse_branch("runs/demo@160") == ("runs/demo", 160)
    assert parse_branch("runs/a@b@7") == ("runs/a@b", 7)
    assert parse_branch("demo") == ("demo", None)
    assert parse_branch("runs/a@b") == ("runs/a@b", None)


WSD = ("optim=wsd", "optim.warmup_steps=2", "optim.learning_rate=0.01", "sparsity.target=0", "trainer.logging_steps=1")


def test_a_decay_that_branches_off_a_trunk_is_the_run_that_would_have_decayed_there(folder):
    runs = folder / "runs"
    train_on_ranks(
        1, command(folder, "trunk", *WSD, "optim.decay_steps=0", "trainer.keep_steps=[5]", "trainer.save_total_limit=1")
    )
    assert sorted(path.name for path in (runs / "trunk" / "checkpoints").iterdir()) == ["checkpoint-12", "checkpoint-5"]
    decay = ["optim.decay_steps=3", "trainer.max_steps=null", f"branch_from={runs}/trunk@5"]
    train_on_ranks(1, command(folder, "decayed", *WSD, *decay))
    train_on_ranks(1, command(folder, "at-once", *WSD, "optim.decay_steps=3", "trainer.max_steps=8"))
    assert records_of(runs / "decayed") == records_of(runs / "at-once")
    assert tensors_of(runs / "decayed", "model/*.safetensors") == tensors_of(runs / "at-once", "model/*.safetensors")
    rates = [record["train/learning_rate"] for record in records_of(runs / "decayed")]
    assert rates[2:5] == [0.01] * 3
    assert rates[5] > rates[6] > rates[7] > 0


def test_the_length_of_a_decay_follows_from_where_it_branches(folder):
    def steps(*changes: str) -> int | None:
        return planned_steps(composed("train", command(folder, "x", *WSD, *changes)))

    assert steps("branch_from=runs/a@80", "trainer.max_steps=null", "optim.decay_steps=20") == 100
    assert steps("branch_from=runs/a@80", "trainer.max_steps=null", "optim.decay_steps=0.2") == 100
    assert steps("branch_from=runs/a@80", "optim.decay_steps=0.2") is None
    assert steps("trainer.max_steps=null", "optim.decay_steps=0.2") is None


def rates(folder: Path, *changes: str) -> list[float]:
    """Return the rate of each step as a share of the peak."""
    config = composed(
        "train", command(folder, "x", "optim=wsd", "optim.learning_rate=1", "sparsity.target=0", *changes)
    )
    PartialState(cpu=True)
    arguments = training_arguments(config, plan_run(config, 1), Path("x"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = arguments.get_warmup_steps(arguments.max_steps)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type, optimizer, warmup, arguments.max_steps, arguments.lr_scheduler_kwargs
    )
    return [scheduler.lr_lambdas[0](step) for step in range(arguments.max_steps)]


@pytest.mark.parametrize("decay", ["4", "0.4"])
def test_the_rate_rises_in_the_warm_up_stays_and_falls_by_the_square_root(folder, decay):
    found = rates(folder, "trainer.max_steps=10", "optim.warmup_steps=2", f"optim.decay_steps={decay}")
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.5, 0.292893, 0.133975], abs=1e-6)
    assert rates(folder, "trainer.max_steps=5", "optim.warmup_steps=2", "optim.decay_steps=0") == [0, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["optim.decay_steps=10", "optim.warmup_steps=3"], "optim.warmup_steps=3 ends at step 3, after the decay of "
         "optim.decay_steps=10 begins at step 2 of 12"),
        (["optim.decay_steps=13"], "optim.decay_steps=13 is longer than the run of 12 steps"),
        (["+optim.lr_scheduler_kwargs.num_stable_steps=3"], "has num_stable_steps, .* set only optim.decay_steps"),
        (["trainer.keep_steps=[4,13]"], "trainer.keep_steps has 13, but the run has only 12 steps"),
    ],
)  # fmt: skip
def test_a_decay_and_steps_to_keep_must_fit_the_run(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        plan_run(composed("train", command(folder, "x", "optim=wsd", "sparsity.target=0", *changes)), 1)


def test_a_schedule_that_follows_evaluations_resumes_and_branches_as_it_was():
    def plateau() -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    before, cosine = plateau(), torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for loss in (2.0, 3.0, 4.0):
        before.step(loss)
    saved = before.state_dict()
    for branches in (False, True):
        after = plateau()
        assert keeps_rates(after, saved, branches)
        load_rates(after, saved, 8, branches)
        assert (after.best, after.last_epoch) == (2.0, 3)
    # A branch with another kind of schedule has the rate of its own step.
    assert not keeps_rates(cosine, saved, True)
    load_rates(cosine, saved, 8, True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 9)


def test_a_window_ends_before_the_decay_begins(folder):
    keys = ["optim=wsd", "optim.decay_steps=0.25", "sparsity.target=0.5", "sparsity.window.start=2"]
    plan_run(composed("train", command(folder, "x", *keys, "sparsity.window.end=9", "sparsity.window.every=1")), 1)
    with pytest.raises(
        ValueError, match=r"window ends at step 10, after the decay of optim.decay_steps=0.25 begins at step 9"
    ):
        plan_run(composed("train", command(folder, "x", *keys, "sparsity.window.end=10", "sparsity.window.every=1")), 1)
    with pytest.raises(ValueError, match=r"optim.decay_steps=0.2 is for .*use optim=wsd"):
        composed("train", command(folder, "x", "optim.decay_steps=0.2"))
