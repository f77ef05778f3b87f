"""Ways to prune side by side: one line a method over its seeds, named by its settings, with N-bar and training FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

from conf.compose import composed
from eval.runs.methods.comparison import Entry, entries_of, has_seeds
from eval.runs.methods.figure import draw_methods, spread_apart
from eval.runs.methods.names import method_names
from eval.runs.methods.text import as_json, cells
from eval.runs.trials import Spread, read_trials
from launch.outcome import compare_methods
from train.plan.compute import run_flops
from train.plan.run import plan_run

SIZE = 393_216
TOKENS = 320 * 16 * 256


def write_run(folder: Path, loss: float, *overrides: str, **figures: float) -> None:
    """Write a finished run's config and summary, as training does; without FLOPs, as older runs."""
    config = composed("train", ["experiment=demo", f"run_name={folder.name}", "trainer.max_steps=320", *overrides])
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    plan = plan_run(config, 1)
    summary = {
        "run_name": folder.name, "data": "pydocs", "world_size": 1, "sparsity": plan.target_sparsity or 0.0,
        "avg_linear_params": plan.average_density * SIZE, "nonzero_linear_params": SIZE - plan.num_pruned,
        "total_tokens": TOKENS, "heldout_loss": loss, "bits_per_byte": loss / 2, **figures,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    for seed, loss in enumerate((4.0, 4.2)):
        write_run(tmp_path / f"constant-{seed}", loss, "sparsity=constant", f"trainer.seed={seed}")
        write_run(tmp_path / f"rigl-{seed}", loss - 0.1, "sparsity=rigl", f"trainer.seed={seed}")
    write_run(tmp_path / "dense", 3.5, "sparsity=dense", training_flops_dense=4e12, training_flops_average=3e12)
    return tmp_path


def test_one_line_a_method_has_mean_and_deviation_over_seeds(sweep):
    entries = entries_of(read_trials([str(sweep)]))
    assert [(entry.name, entry.loss.num) for entry in entries] == [("dense", 1), ("rigl", 2), ("constant", 2)]
    assert entries[2].loss.mean == pytest.approx(4.1)
    assert entries[2].loss.std == pytest.approx(0.2 / 2**0.5)
    assert cells(entries[2])[:4] == ["constant", "2", "78.64K", "78.64K"]
    assert cells(entries[2])[6] == "4.1000 ± 0.1414"
    assert [entry.dense_gap and (round(entry.dense_gap.mean, 6), entry.dense_gap.num) for entry in entries] == [
        None, (0.4, 1), (0.5, 1),
    ], "the dense run has the first seed alone"  # fmt: skip
    assert has_seeds(entries)
    assert as_json(entries)[0]["flops_average"] == 3e12


def test_dense_runs_that_differ_in_keys_without_effect_are_one_line(sweep):
    write_run(sweep / "dense-0", 3.7, "sparsity=rigl", "sparsity.target=0")
    write_run(sweep / "dense-1", 3.9, "sparsity.target=0", "sparsity.window.end=0.5", "trainer.seed=1", "eval.every=10")
    write_run(sweep / "rigl-2", 4.2, "sparsity=rigl", "trainer.seed=2", "export.dtype=bfloat16")
    entries = entries_of(read_trials([str(sweep)]))
    assert [(entry.name, entry.loss.num) for entry in entries] == [("dense", 2), ("rigl", 3), ("constant", 2)]
    assert entries[0].loss.mean == pytest.approx(3.75), "two runs of the first seed count once"
    assert entries[2].dense_gap is not None
    assert entries[2].dense_gap.num == 2


def test_dense_runs_of_two_sizes_are_two_lines_and_equal_twins_one(sweep):
    for group, size in (("cubic", 2e5), ("rigl", 1e5), ("set", 1e5)):
        figures = {"avg_linear_params": size, "sparsity": 0.0}
        write_run(sweep / f"{group}-twin", 3.4, f"sparsity={group}", "model.match=average", **figures)
    entries = [entry for entry in entries_of(read_trials([str(sweep)])) if not entry.is_sparse]
    assert [(entry.name, entry.loss.num) for entry in entries] == [
        ("dense, model.match=average, 200.00K", 1), ("dense, model.match=average, 100.00K", 1), ("dense, model.match=None", 1),
    ]  # fmt: skip


def test_older_runs_without_flops_get_them_from_their_config(sweep):
    rigl, constant = entries_of(read_trials([str(sweep)]))[1:]
    attention = 12 * 4 * 64 * 256
    assert constant.flops_dense == pytest.approx(TOKENS * (6 * SIZE + attention))
    assert constant.flops_average == pytest.approx(TOKENS * (6 * 0.2 * SIZE + attention))
    # 320 steps move masks every 8 steps before step 240: 29 steps whose weight gradients, 2 of 6 FLOPs, are dense.
    assert rigl.flops_average - constant.flops_average == pytest.approx(TOKENS * 29 / 320 * 2 * 0.8 * SIZE)


@pytest.mark.parametrize(
    ("overrides", "extra"),
    [
        (["sparsity=cubic"], 0.0),
        (["sparsity=ste"], 1.0),
        # One event before step 80: the gradients of step 79 are those of all weights, which are active still.
        (["sparsity=one_shot", "sparsity.score=saliency", "sparsity.window.start=80"], 0.0),
        (["sparsity=linear", "sparsity.score=saliency", "sparsity.window={start:80,end:90,every:10}"], 0.4 / 320),
    ],
)
def test_dense_gradients_cost_a_third_of_a_step_for_each_pruned_weight(overrides, extra):
    plan = plan_run(composed("train", ["experiment=demo", "trainer.max_steps=320", *overrides]), 1)
    average = plan.average_density * SIZE
    share = extra * (1 - plan.average_density) if overrides == ["sparsity=ste"] else extra
    bare = TOKENS * (6 * average + 12 * 4 * 64 * 256)
    assert run_flops(plan, average).average - bare == pytest.approx(TOKENS * 2 * share * SIZE, abs=1)


def test_calibration_costs_a_forward_pass_for_each_of_its_tokens_and_rows_have_thresholds_of_their_own():
    plan = plan_run(composed("train", ["experiment=demo", "trainer.max_steps=320", "sparsity=wanda"]), 1)
    attention, average = 12 * 4 * 64 * 256, plan.average_density * SIZE
    found = run_flops(plan, average)
    forward = 128 * 256 * (2 * SIZE + attention / 3)
    assert found.dense == pytest.approx(TOKENS * (6 * SIZE + attention) + forward)
    assert found.average == pytest.approx(TOKENS * (6 * average + attention) + forward)
    assert plan.num_thresholds == 4 * (4 * 64 + 2 * 256 + 64) + 2048
    # Rows of 64 and of 256 inputs lose 51 and 205.
    assert plan.num_pruned == 4 * ((4 * 64 + 2 * 256) * 51 + 64 * 205) + 2048 * 51


def names(*runs: list[str]) -> list[str]:
    def settings(overrides: list[str]) -> dict:
        folder = composed("train", ["experiment=demo", *overrides])
        return {
            "sparsity.target": folder.sparsity.target, "sparsity.schedule": folder.sparsity.schedule,
            "sparsity.normalize": folder.sparsity.normalize, "sparsity.window.end": folder.sparsity.window.end,
            "sparsity.window.start": folder.sparsity.window.start, "trainer.max_steps": folder.trainer.max_steps,
        }  # fmt: skip

    return method_names([settings(overrides) for overrides in runs])


def test_a_method_is_named_by_the_nearest_choice_and_what_differs():
    assert names(["sparsity=cubic"], ["sparsity.normalize=l2"], ["sparsity=dense"]) == [
        "cubic", "geometric, normalize=l2", "dense",
    ]  # fmt: skip
    assert names(["sparsity.target=0.4"], ["sparsity.target=0.8"]) == [
        "geometric, target=0.4", "geometric, target=0.8",
    ]  # fmt: skip
    assert names(["trainer.max_steps=5"], ["trainer.max_steps=9"])[1] == "geometric, trainer.max_steps=9"


def test_a_sweep_over_seeds_ends_with_the_table_and_its_figure(sweep, tmp_path, capsys):
    summaries = {folder: json.loads((folder / "summary.json").read_text()) for folder in sorted(sweep.iterdir())}
    compare_methods(summaries, tmp_path / "methods.png")
    assert "| rigl     | 2 " in capsys.readouterr().out
    assert imread(tmp_path / "methods.png").std() > 0.01
    one_seed = {folder: summary for folder, summary in summaries.items() if not folder.name.endswith("1")}
    compare_methods(one_seed, tmp_path / "none.png")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "none.png").exists()


def test_labels_that_share_a_place_are_moved_apart_and_others_stay():
    boxes = [(0.0, 10.0), (5.0, 15.0), (20.0, 30.0)]
    assert spread_apart([1.0, 2.0, 1.5], boxes, 4.0) == pytest.approx([-0.5, 3.5, 1.5])


def test_a_figure_leaves_out_unknown_flops(tmp_path):
    entry = Entry("a", True, 1e5, 5e4, None, None, Spread(4.0, None, 1), Spread(2.0, None, 1))
    draw_methods([entry], tmp_path / "a.png")
    assert cells(entry)[4:6] == ["", ""]
