"""A search by Optuna: each trial is a run whose held-out loss is returned to the sweeper."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from tests.commands import run_command
from tests.test_run import tiny, write_text

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_search_keeps_the_run_with_the_lowest_heldout_loss(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'sparsellm[search]'")
    write_text(tmp_path / "text.jsonl")
    own = [
        item for item in tiny(tmp_path, "logger=none") if item.split("=")[0] not in ("run_name", "optim.learning_rate")
    ]
    arguments = [*own, "trainer.max_steps=12", "launch.num_processes=1", "sweep=optuna_window", "sweep_name=search"]
    arguments += ["sparsity.score=choice(examples.own_score:Momentum)", "prompt=a:b"]
    done = run_command(["launch", "-m", *arguments, "hydra.sweeper.n_trials=2"], timeout_s=500)
    assert done.returncode == 0, done.stderr[-3000:]
    best = OmegaConf.load(tmp_path / "runs" / "search" / "optimization_results.yaml")
    runs = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs" / "search").glob("*/summary.json")
    }
    assert len(runs) == 2
    losses = {name: run["heldout_loss"] for name, run in runs.items()}
    assert best.best_value == pytest.approx(min(losses.values()))
    window = {"sparsity.window.start", "sparsity.window.end"}
    assert set(best.best_params) == {*window, "optim.learning_rate", "sparsity.score"}
    for name in runs:
        config = OmegaConf.load(tmp_path / "runs" / "search" / name / "config.yaml")
        assert config.prompt == "a:b"
        assert config.sparsity.score == "examples.own_score:Momentum"
    name = min(losses, key=losses.__getitem__)
    assert runs[name]["learning_rate"] == pytest.approx(best.best_params["optim.learning_rate"])
    assert f"best     {name}: held-out loss {losses[name]:.4f}" in done.stdout
