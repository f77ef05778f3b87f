"""Summaries of imagined runs and their model cards, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from conf import cli, schema
from conf.schema import Config
from train.plan.run import RunPlan, plan_run
from train.record.card import card_text

TINY = (
    "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=2", "model.max_position_embeddings=32",
    "batch_size=8", "trainer.max_steps=1000", "sparsity.target=0.75", "sparsity.window.start=200",
    "sparsity.window.end=600", "sparsity.window.every=50", "sparsity.window.of=steps",
)  # fmt: skip


def compose_run(*overrides: str) -> tuple[Config, RunPlan]:
    schema.register()
    with initialize_config_module(config_module="conf", version_base="1.3"):
        config = cli.typed(compose("train", overrides=[*TINY, "run_name=tiny", *overrides]))
    return config, plan_run(config, world_size=1)


def make_summary(plan: RunPlan, **changes: Any) -> dict[str, Any]:
    """Return figures that a run with this plan might have measured."""
    schedule, linear = plan.schedule, plan.counts.linear
    return {
        "run_name": plan.run_dir.name,
        "data": "pydocs",
        "world_size": 2,
        "fsdp_version": 2,
        "total_params": plan.counts.total,
        "linear_params": linear,
        "nonzero_linear_params": linear // 4 if schedule else linear,
        "sparsity": 0.75 if schedule else 0.0,
        "average_density": plan.average_density,
        "avg_linear_params": plan.average_density * linear,
        "steps": plan.num_steps,
        "batch_tokens": plan.batch_tokens,
        "total_tokens": plan.total_tokens,
        "learning_rate": 3e-4,
        "final_train_loss": 2.22745,
        "final_train_loss_std": 0.02114,
        "heldout_loss": 2.31549,
        "perplexity": 10.129846,
        "perplexity_window": 32,
        "bits_per_byte": 1.234561,
        "unigram_bits_per_byte": 3.456789,
        "heldout_tokens": 12345,
        "heldout_bytes": 54321,
        "prune_start_step": schedule.start_step if schedule else None,
        "prune_end_step": schedule.end_step if schedule else None,
        "prune_every_steps": schedule.every_steps if schedule else None,
        "seconds": 5400.0,
        **changes,
    }


def make_card(*overrides: str, siblings: Sequence[dict[str, Any]] = (), **changes: Any) -> str:
    config, plan = compose_run(*overrides)
    return card_text(config, plan, make_summary(plan, data=config.data.source, **changes), siblings)


def line_of(card: str, name: str) -> str:
    """Return the bullet called `name`."""
    (line,) = re.findall(rf"^- \*\*{re.escape(name)}:\*\* (.*)$", card, flags=re.MULTILINE)
    return line


def finish_run(folder: Path, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
