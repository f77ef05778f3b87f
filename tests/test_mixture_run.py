"""A run on a mixture: tokens by source in its records, summary and card; after a kill it resumes to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.interrupted import records_of, tensors_of
from tests.processes import launched
from tests.tiny_run import tiny, write_text


def command(folder: Path, name: str, *more: str) -> list[str]:
    text = [item for item in tiny(folder) if not item.startswith("data.path") and item != "data=text"]
    sources = f"[{{path:{folder}/text.jsonl,weight:7}},{{path:{folder}/few.jsonl,weight:3,name:few}}]"
    return [
        *text, "data=mixture", f"data.sources={sources}", f"run_name={name}", "logger=none", "trainer.save_steps=5",
        "data.attention=document", "trainer.data_seed=3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    lines = write_text(folder / "text.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(lines[:40]))
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    done = run_command(["launch", *command(folder, "whole")])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "whole"


def test_records_summary_and_card_have_the_tokens_of_each_source(whole):
    records = records_of(whole)
    for record in records:
        by_source = [record["train/tokens/text"], record["train/tokens/few"]]
        assert sum(by_source) == record["train/tokens"]
    last = records[-1]
    assert last["train/tokens/few"] / last["train/tokens"] == pytest.approx(0.3, abs=0.12)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tokens_by_source"] == {"text": last["train/tokens/text"], "few": last["train/tokens/few"]}
    assert last["train/epochs/few"] == summary["epochs_by_source"]["few"]
    assert "**Tokens by source:** text " in (whole / "model" / "README.md").read_text()


def test_a_killed_run_on_a_mixture_resumes_to_the_same_bits(folder, whole):
    run_dir = folder / "runs" / "killed"
    with launched(command(folder, "killed"), run_dir) as run:
        run.wait_for_step(12)
        run.kill_all()
    with launched(command(folder, "killed"), run_dir) as run:
        assert run.wait() == 0, run.stderr[-3000:]
        assert "resumed from" in run.stdout
    assert records_of(run_dir) == records_of(whole)
    assert tensors_of(run_dir, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def test_eval_of_the_model_gives_the_runs_own_figures(whole):
    summary = json.loads((whole / "summary.json").read_text())
    options = [f"{key}={value}" for key, value in summary["eval_overrides"].items()]
    done = run_command(["eval", f"model={whole}/model", "data=mixture", *options, "format=json"])
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    for name in ("perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(summary[name], rel=1e-5)


def test_one_process_reads_the_blocks_that_two_do(folder, whole):
    done = run_command(["launch", *command(folder, "alone", "launch.num_processes=1")])
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(records_of(folder / "runs" / "alone"), records_of(whole), strict=True):
        assert one["train/tokens/few"] == two["train/tokens/few"]
        assert one.get("train/loss") == pytest.approx(two.get("train/loss"), rel=1e-3)
