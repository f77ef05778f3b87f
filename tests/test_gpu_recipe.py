"""The points of the authors' recipe: the runs, their learning rates, and the page of their results."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conf.compose import composed
from tests.commands import ROOT
from tests.gpu import recipe
from tests.gpu.recipe_page import page, seeds_to_show
from tests.gpu.recipe_run import best_rate, layer_densities, rate_losses
from train.plan.run import plan_run

ON_CPUS = ["experiment=journey", "launch.num_processes=1"]


def overrides_of(step: Any) -> list[str]:
    """The arguments of `python -m launch` that a run's step ends in."""
    return [word for word in step.command[4:] if "=" in word]


def test_rates_come_first_and_every_arm_has_three_pairs(tmp_path):
    names = [step.name for step in recipe.recipe_steps(tmp_path, tmp_path, False)][2:]
    assert len(names) == len(set(names)) == (5 * 3 + 4) * 2 + 6 * 3 + 5 * 2
    assert names[0] == "plain-0.003-seed0-twin"
    first_pair = names.index("plain-80p-seed0")
    assert {name.split("-")[1] for name in names[:first_pair]} == {"0.003", "0.006", "0.012", "0.024", "0.048"}
    for point in recipe.POINTS:
        assert {f"{point}-80p-seed{seed}" for seed in (0, 1, 2)} <= set(names)
    assert "plain-seed2-twin" in names
    assert not [name for name in names if name.startswith("normalized") and "80p" not in name]


def test_a_step_names_the_folder_that_its_run_gets_and_arms_differ_in_one_point(tmp_path):
    plain = None
    for step in recipe.recipe_steps(tmp_path, tmp_path, False, ON_CPUS)[2:]:
        if "seed0" not in step.name or "0.00" in step.name:
            continue
        config = composed("train", overrides_of(step))
        assert step.command[3] == str(plan_run(config, 1).run_dir), step.name
        now = (config.model.init, config.model.query_scale, config.data.attention, config.sparsity.normalize)
        plain = plain or now
        point = step.name.split("-")[0]
        changed = sum(a != b for a, b in zip(now, plain, strict=True))
        assert changed == {"plain": 0, "authors": 3}.get(point, 1), step.name


def test_the_rate_with_the_lowest_mean_loss_of_two_seeds_is_taken(tmp_path):
    for rate, seed, loss in ((0.003, 0, 4.0), (0.003, 1, 4.4), (0.006, 0, 4.3), (0.006, 1, 4.2), (0.012, 0, 3.0)):
        folder = tmp_path / f"init-{rate:g}-seed{seed}-twin"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"learning_rate": rate, "heldout_loss": loss}))
    (tmp_path / "init-seed2-twin").mkdir()
    (tmp_path / "init-seed2-twin" / "summary.json").write_text(json.dumps({"learning_rate": 1.0, "heldout_loss": 0.0}))
    losses = rate_losses(tmp_path, "init")
    assert losses == {0.003: [4.0, 4.4], 0.006: [4.3, 4.2], 0.012: [3.0]}
    assert best_rate(losses) == 0.003


def test_densities_are_those_of_the_exported_matrices(tmp_path):
    save_file(
        {"a.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "norm.weight": torch.ones(2)}, tmp_path / "x.safetensors"
    )
    assert layer_densities(tmp_path) == {"a.weight": 0.25}


def test_the_number_of_seeds_follows_from_the_spread():
    """Two groups of n with a standard deviation of 1 show a difference of 1 at n = 2 (1.960 + 0.842)^2 = 15.7."""
    assert seeds_to_show(1.0, 1.0 + 1.0) == seeds_to_show(-1.0, 2.0) == 16
    assert seeds_to_show(0.5, 2.0) == 63
    assert seeds_to_show(1.0, 1.0 + 0.0) == 8


def result() -> dict[str, Any]:
    """Losses whose gaps are 0.1, 0.2 and 0.3 for plain, and 0.5 more for the folded query."""
    steps: list[dict[str, Any]] = [
        {"name": "device", "outcome": "passed", "figures": {"machine": "EPYC", "cores": 2, "torch": "2.13.0"}},
        {"name": "folded-80p-seed3", "outcome": "failed", "figures": None},
    ]
    densities = {f"model.layers.{block}.{kind}.weight": 0.1 * (block + 1) for block in (0, 1) for kind in KINDS}
    for point, more in (("plain", 0.0), ("folded", 0.5)):
        for seed in (0, 1, 2):
            for name, loss in (
                (f"{point}-0.006-seed{seed}-twin", 4.0),
                (f"{point}-80p-seed{seed}", 4.1 + 0.1 * seed + more),
            ):
                summary = {"learning_rate": 0.006, "heldout_loss": loss}
                figures = {"name": name, "summary": summary, "densities": densities}
                steps.append({"name": name, "outcome": "passed", "figures": figures})
    return {"command": "python -m tests.gpu recipe", "started": "2026-11-26T20:00:00", "steps": steps}


KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def test_the_page_tells_gaps_their_spread_and_the_seeds_that_would_show_a_difference(tmp_path):
    text = page(result(), tmp_path / "recipe.png")
    assert "; 2 cores of EPYC, torch 2.13.0" in text
    assert "| recipe=plain | 0.006 |  | 4.000 ± 0.000 | 4.200 ± 0.100 | +0.200 ± 0.100 |  |  |" in text
    assert "| +0.700 ± 0.100 | +0.500 ± 0.082 | 2 |" in text
    assert "| recipe=plain | 0.150 | 0.150 |" in text
    assert (tmp_path / "recipe.png").stat().st_size > 1000


@pytest.mark.skipif(not (ROOT / "docs" / "recipe.json").is_file(), reason="no results of the recipe are committed")
def test_the_page_of_the_recipe_is_made_of_its_file():
    content = json.loads((ROOT / "docs" / "recipe.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page(content)
