"""One tiny run through `python -m launch` on two FSDP2 ranks, and everything that it leaves."""

from __future__ import annotations

import json
import math
import shlex
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.runs.page.panels import PANELS, TABLE
from sparsity.prunable import linear_weights
from sparsity.schedule import Geometric
from tests.commands import errors_in, run_command
from tests.tiny_run import STEPS, tiny, write_text
from tests.wandb_file import read_config, read_history, read_labels, read_summary, step_metrics

EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=12")
SUMMARY_KEYS = {
    "run_name", "world_size", "fsdp_version", "total_params", "linear_params", "nonzero_linear_params", "sparsity",
    "average_density", "avg_linear_params", "steps", "batch_tokens", "total_tokens", "learning_rate",
    "final_train_loss", "final_train_loss_std", "perplexity", "bits_per_byte", "unigram_bits_per_byte",
    "prune_start_step", "prune_end_step", "seconds", "training_flops_dense", "training_flops_average",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    write_text(folder / "text.jsonl")
    done = run_command(["launch", *tiny(folder, *EVALUATED)])
    assert done.returncode == 0, done.stderr[-4000:]
    return {"folder": folder, "dir": folder / "runs" / "tiny", "stdout": done.stdout, "stderr": done.stderr}


@pytest.fixture(scope="module")
def summary(run) -> dict[str, Any]:
    return json.loads((run["dir"] / "summary.json").read_text())


@pytest.fixture(scope="module")
def records(run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run["dir"] / "metrics.jsonl").read_text().splitlines()]


def test_the_run_leaves_what_the_contract_names(run, summary):
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.png", "model", "wandb"):
        assert (run["dir"] / name).exists(), name
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["world_size"], summary["fsdp_version"], summary["steps"]) == (2, 2, STEPS)
    assert summary["batch_tokens"] == 8 * 32
    assert summary["total_tokens"] == STEPS * 8 * 32


def test_the_run_learns(records, summary):
    first = next(record["train/loss"] for record in records if "train/loss" in record)
    assert summary["final_train_loss"] < 0.7 * first


def test_density_follows_the_schedule_at_every_step(records, summary):
    schedule = Geometric(0.8, summary["prune_start_step"], summary["prune_end_step"], summary["prune_every_steps"])
    steps = [record for record in records if "train/loss" in record]
    assert [record["train/global_step"] for record in steps] == list(range(1, STEPS + 1))
    for step, record in enumerate(steps):
        num_pruned = round((1 - schedule.density(step)) * summary["linear_params"])
        assert record["sparsity/density"] == pytest.approx(1 - num_pruned / summary["linear_params"], abs=1e-12)
        so_far = sum(steps[i]["sparsity/density"] for i in range(step + 1)) / (step + 1)
        assert record["sparsity/average_density"] == pytest.approx(so_far, abs=1e-12)
    assert summary["average_density"] == pytest.approx(steps[-1]["sparsity/average_density"], abs=1e-12)
    assert summary["average_density"] == pytest.approx(schedule.average_density(STEPS), abs=1e-4)


def test_final_loss_is_the_mean_over_the_last_steps(records, summary):
    losses = [record["train/loss"] for record in records if "train/loss" in record][-2:]
    mean = sum(losses) / 2
    assert summary["final_train_loss"] == pytest.approx(mean, rel=1e-5)
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2)
    assert summary["final_train_loss_std"] == pytest.approx(spread, rel=1e-2, abs=1e-5)


def test_records_hold_what_a_dashboard_needs(records):
    keys = {key for record in records for key in record}
    for key in (
        "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/tokens_per_second",
        "sparsity/density", "sparsity/target_density", "sparsity/average_density", "sparsity/threshold",
        "sparsity/nonzero_linear_params", "layer_density/lm_head.weight", "perf/tokens_per_second",
        "perf/data_wait_seconds",
    ):  # fmt: skip
        assert key in keys
    thresholds = [record["sparsity/threshold"] for record in records if "sparsity/threshold" in record]
    assert thresholds[0] > 0


def test_every_figure_that_panels_and_table_show_is_one_that_a_run_leaves(records, summary):
    logged = {key for record in records for key in record}
    for panel in PANELS:
        if panel.y == "perf/mfu":
            # Only runs on GPUs have it.
            continue
        left = logged if panel.of_records else summary.keys()
        assert panel.x in left, panel.name
        assert any(fnmatchcase(key, panel.y) for key in left), panel.name
    assert summary.keys() >= set(TABLE.values())


def test_wandb_holds_the_same_records(run, records):
    history = read_history(next(run["dir"].glob("wandb/offline-run-*/run-*.wandb")))
    assert len(history) == len(records)
    for mine, theirs in zip(records, history, strict=True):
        assert {key: theirs[key] for key in mine} == mine
    assert any("sparsity/layer_density" in record or "sparsity/layer_density/_type" in record for record in history)


def test_wandb_holds_config_and_summary_and_has_tokens_as_its_axis(run, summary):
    path = next(run["dir"].glob("wandb/offline-run-*/run-*.wandb"))
    config = read_config(path)
    assert read_labels(path) == ("", "sparse", ["llama-tiny", "sparsity-80"])
    assert config["sparsity"]["target"] == 0.8
    assert config["schedule"]["end_step"] == summary["prune_end_step"]
    assert config["model"]["hidden_size"] == 32
    found = read_summary(path)
    for name in ("perplexity", "bits_per_byte", "average_density", "nonzero_linear_params", "total_tokens"):
        assert found[name] == summary[name]
    assert step_metrics(path)["sparsity/*"] == "train/tokens"
    assert step_metrics(path)["train/*"] == "train/tokens"
    assert step_metrics(path)["perf/*"] == "train/tokens"


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(records):
    rates = [record["train/learning_rate"] for record in records if "train/learning_rate" in record]
    assert max(rates) == pytest.approx(0.01)
    assert 0.001 <= rates[-1] < 0.0012


def test_the_model_folder_is_plain_transformers_with_exact_zeros(run, summary):
    tensors = load_file(run["dir"] / "model" / "model.safetensors")
    prunable = {name: t for name, t in tensors.items() if "proj" in name or name == "lm_head.weight"}
    zeros = sum(int((t == 0).sum()) for t in prunable.values())
    assert sum(t.numel() for t in prunable.values()) == summary["linear_params"]
    assert zeros == round(0.8 * summary["linear_params"])
    assert summary["nonzero_linear_params"] == summary["linear_params"] - zeros
    assert not any(torch.signbit(t[t == 0]).any() for t in prunable.values())
    config = json.loads((run["dir"] / "model" / "config.json").read_text())
    assert "sparsity_config" not in config
    model = AutoModelForCausalLM.from_pretrained(run["dir"] / "model")
    assert sum(p.numel() for p in model.parameters()) == summary["total_params"]
    assert len(linear_weights(model)) == 2 * 7 + 1
    text = AutoTokenizer.from_pretrained(run["dir"] / "model").decode(model.generate(max_new_tokens=4)[0])
    assert isinstance(text, str)


def test_the_printed_eval_command_gives_the_runs_own_figures(run, summary):
    printed = next(line for line in run["stdout"].splitlines() if "-m eval" in line)
    done = run_command([*shlex.split(printed.split(" -m ")[1]), "format=json"])
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    for name in ("perplexity", "bits_per_byte", "unigram_bits_per_byte"):
        assert figures[name] == pytest.approx(summary[name], rel=1e-6)
    assert figures["zero_linear_params"] == summary["linear_params"] - summary["nonzero_linear_params"]


def test_the_ending_tells_the_line_the_places_a_sample_and_what_next(run, summary):
    lines = run["stdout"].splitlines()
    row = next(line for line in lines if line.startswith("| tiny"))
    assert "80.00%" in row
    assert f"{summary['perplexity']:.2f}" in row
    for word in ("model ", "report ", "wandb ", "a sample:", "next:", "bits per byte"):
        assert any(word in line for line in lines), word
    assert "Traceback" not in run["stderr"]


def test_a_finished_run_prints_its_line_again_and_exits_0(run):
    done = run_command(["launch", *tiny(run["folder"], *EVALUATED)])
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("| tiny") for line in done.stdout.splitlines())


def test_another_config_in_the_same_folder_is_refused_by_name(run):
    done = run_command(["launch", *tiny(run["folder"], *EVALUATED, "optim.weight_decay=0.2")])
    assert done.returncode != 0
    errors = errors_in(done.stderr)
    assert len(errors) == 1
    assert "trainer.weight_decay was 0.1, is 0.2" in errors[0]
    assert "overwrite=true" in errors[0]
    assert "Traceback" not in done.stderr


def test_one_process_and_two_train_the_same_model(run, summary):
    done = run_command(["launch", *tiny(run["folder"], "launch.num_processes=1", "run_name=one", "logger=none")])
    assert done.returncode == 0, done.stderr[-3000:]
    one = json.loads((run["folder"] / "runs" / "one" / "summary.json").read_text())
    assert (one["world_size"], one["fsdp_version"]) == (1, 2)
    for name in ("final_train_loss", "perplexity", "bits_per_byte"):
        assert one[name] == pytest.approx(summary[name], rel=1e-3)
    assert not (run["folder"] / "runs" / "one" / "wandb").exists()
