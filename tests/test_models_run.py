"""A whole run of every supported architecture: trained, pruned, resumed on two ranks, exported, scored and compacted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import sparsity.compact  # noqa: F401 - transformers then loads compact folders
from eval.model.zeros import count_zeros
from sparsity.compact.folder import compact_folder
from tests.architectures import CONFIGS, folder_of
from tests.commands import run_command
from tests.ranks_of_a_run import train_on_ranks
from tests.tiny_run import write_text

pytestmark = pytest.mark.timeout(900)
QUICK = ("qwen3", "mixtral")
"""The architectures that `make test` runs; `make test-cluster` runs the others."""


def command(folder: Path, name: str, run_name: str) -> list[str]:
    return [
        "model=hf", f"model.path={folder / name}", f"init_from={folder / name}", "data=text",
        f"data.path={folder}/text.jsonl", "data.heldout_share=0.02", f"data.cache_dir={folder}/cache",
        "data.sequence_length=32", f"runs_dir={folder}/runs", f"run_name={run_name}", "batch_size=8",
        "trainer.max_steps=6", "trainer.save_steps=3", "trainer.per_device_train_batch_size=2", "trainer.logging_steps=1",
        "optim.learning_rate=0.01", "sparsity.target=0.5", "sparsity.window.start=1", "sparsity.window.end=4",
        "sparsity.window.every=1", "logger=none",
    ]  # fmt: skip


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.cluster) for name in CONFIGS]
)
def test_a_run_prunes_resumes_on_two_ranks_exports_and_compacts(tmp_path, name):
    write_text(tmp_path / "text.jsonl")
    options = {"dtype": torch.bfloat16} if name in ("qwen3", "mixtral") else {}
    folder_of(name, tmp_path / name, **options)
    train_on_ranks(1, command(tmp_path, name, "whole"))
    whole = tmp_path / "runs" / "whole"
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["nonzero_linear_params"] == summary["linear_params"] - round(0.5 * summary["linear_params"])

    # The result is a plain folder with the names of the original one, and the zeros in its linear weights.
    assert names_in(whole / "model") == names_in(tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    zeros = count_zeros(model)
    assert (zeros.num_weights, zeros.num_zeros) == (summary["linear_params"], round(0.5 * summary["linear_params"]))

    again = tmp_path / "runs" / "again"
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("summary.json", "model", "checkpoint-6"))
    config = (again / "config.yaml").read_text().replace("run_name: whole", "run_name: again")
    (again / "config.yaml").write_text(config)
    train_on_ranks(2, command(tmp_path, name, "again"))
    resumed = AutoModelForCausalLM.from_pretrained(again / "model")
    for (key, mine), theirs in zip(resumed.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine == 0, theirs == 0), key
    found = json.loads((again / "summary.json").read_text())
    assert found["world_size"] == 2
    assert found["heldout_loss"] == pytest.approx(summary["heldout_loss"], abs=1e-5)

    options = [
        f"data.path={tmp_path}/text.jsonl",
        "data.heldout_share=0.02",
        f"data.cache_dir={tmp_path}/cache",
        "window=32",
    ]
    done = run_command(["eval", f"model={whole / 'model'}", "data=text", *options, "batch_size=2", "format=json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], abs=1e-6)

    compact_folder(whole / "model", tmp_path / "compact")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    for (key, mine), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), key
    loaded.save_pretrained(tmp_path / "plain")
    assert names_in(tmp_path / "plain") == names_in(tmp_path / name)
