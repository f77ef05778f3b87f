"""Reading run folders, and what a panel shows of them."""

from __future__ import annotations

import json

import pytest

from eval.runs.page.curves import curves, final_layers, layer_rows, record_points, thinned
from eval.runs.page.law import fit_runs
from eval.runs.page.page import row
from eval.runs.page.panels import PANELS, TABLE
from eval.runs.run import read_runs
from tests.panel_runs import write_run, write_sweep
from train.record.table import COLUMNS

BY_NAME = {panel.name: panel for panel in PANELS}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("panels") / "sweep")


@pytest.fixture(scope="module")
def runs(sweep):
    return read_runs([str(sweep)])


def test_runs_are_named_by_folders_of_them_patterns_and_themselves_each_once(sweep):
    assert [run.name for run in read_runs([str(sweep)])] == ["dense", "going", "half", "most", "most-twin"]
    names = [str(sweep / "half"), str(sweep / "m*"), str(sweep / "most")]
    assert [run.name for run in read_runs(names)] == ["half", "most", "most-twin"]


def test_a_name_without_a_run_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "holds no run"), ("missing", "is not there")):
        with pytest.raises(ValueError, match=words):
            read_runs([str(tmp_path / name)])


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for seed in "ab":
        write_run(tmp_path / seed / "levels" / "x")
    assert [run.name for run in read_runs([str(tmp_path)])] == ["a/levels/x", "b/levels/x"]


def test_a_sparse_run_and_its_dense_twin_are_a_pair(runs):
    pair = {run.name: run.pair for run in runs}
    assert pair["most"] == pair["most-twin"]
    assert len({pair[name] for name in ("dense", "going", "half", "most")}) == 4


def test_a_run_without_a_summary_shows_what_its_config_and_its_last_record_say(runs):
    run = next(run for run in runs if run.name == "going")
    assert not run.is_finished
    assert run.state.startswith("not finished: step 12 of 40, last record 20")
    assert run.is_sparse
    assert run.figures["batch_tokens"] == 256
    assert run.figures["total_tokens"] == 40 * 256
    assert run.figures["sparsity"] == pytest.approx(0.8)
    assert run.figures["avg_linear_params"] == pytest.approx(0.6 * run.figures["linear_params"])
    assert "final_train_loss" not in run.figures


def test_a_line_that_is_being_written_and_a_config_of_another_version_are_put_up_with(tmp_path):
    folder = write_run(tmp_path / "torn", sparsity=0.5, finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"train/global_st')
    (folder / "config.yaml").write_text("another: version\n")
    (run,) = read_runs([str(folder)])
    assert len(run.records) == 20
    assert run.figures == {"run_name": "torn"}
    assert run.state.startswith("not finished: step 20, ")


def test_damaged_records_are_refused_by_name(tmp_path):
    folder = write_run(tmp_path / "bad")
    (folder / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"bad/metrics\.jsonl is not a file of records"):
        read_runs([str(folder)])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"train/loss": 1.0, "train/tokens": 9}', "line 21 has train/global_step=None"),
        ('{"train/loss": 1.0, "train/tokens": 9, "train/global_step": 0}', "train/global_step=0, and records count from 1"),
        ('{"train/loss": 1.0, "train/global_step": 21}', "train/tokens=None"),
        ('[1, 2]', "line 21 is not a record"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_say_when_it_was_made_is_refused_by_line(tmp_path, line, words):
    folder = write_run(tmp_path / "odd", finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=words):
        read_runs([str(folder)])


def test_an_evaluation_before_the_first_step_is_a_record(tmp_path):
    folder = write_run(tmp_path / "early", finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"eval/loss": 1.0, "train/tokens": 0, "train/global_step": 0}\n')
    (run,) = read_runs([str(folder)])
    assert len(run.records) == 21


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "words", "trainer: 3\n", "\x00"])
def test_a_garbled_config_of_an_unfinished_run_leaves_its_figures_unknown(tmp_path, text):
    folder = write_run(tmp_path / "torn", finished=False)
    (folder / "config.yaml").write_text(text)
    (run,) = read_runs([str(folder)])
    assert run.figures == {"run_name": "torn"}


def test_a_summary_with_odd_figures_still_has_its_row(tmp_path):
    odd = {"linear_params": "many", "avg_linear_params": None, "perplexity": "low"}
    names = [str(write_run(tmp_path / name, **figures)) for name, figures in (("odd", odd), ("plain", {}))]
    runs = read_runs(names)
    assert [run.pair for run in runs] == [0, 1]
    assert set(row(0, runs[0])["cells"]) == {""}


def test_a_curve_has_every_record_and_a_dense_run_has_density_1(runs):
    by_run = {runs[curve.run].name: curve for curve in curves(BY_NAME["density"], runs)}
    assert by_run["half"].y == (1.0,) * 10 + (0.5,) * 10
    assert by_run["half"].x == tuple(float(256 * step) for step in range(1, 21))
    assert (by_run["dense"].x, by_run["dense"].y) == ((256.0, 5120.0), (1.0, 1.0))
    assert "dense" not in {runs[curve.run].name for curve in curves(BY_NAME["threshold"], runs)}


def test_points_are_those_of_finished_runs(runs):
    points = {runs[curve.run].name: (curve.x, curve.y) for curve in curves(BY_NAME["loss_avg_params"], runs)}
    assert set(points) == {"dense", "half", "most", "most-twin"}
    assert points["half"][0] == (0.75 * 30_080,)


def test_a_value_that_is_not_finite_is_no_point(tmp_path):
    folder = write_run(tmp_path / "r", steps=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["train/loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([str(folder)])
    assert [x for x, _ in record_points(BY_NAME["loss"], run)] == [512.0]


def test_thinning_keeps_ends_order_and_every_spike():
    points = [(float(step), 1.0) for step in range(1000)]
    points[617], points[618] = (617.0, 99.0), (618.0, -7.0)
    kept = thinned(points, 40)
    assert len(kept) <= 40
    assert kept == sorted(kept)
    assert {points[0], points[999], points[617], points[618]} <= set(kept)
    assert thinned(points[:40], 40) == points[:40]


def test_the_final_layers_are_those_of_the_last_record_that_has_them(runs):
    most = next(run for run in runs if run.name == "most")
    layers = final_layers(BY_NAME["layer_density"], most)
    assert len(layers) == 15
    assert layers["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.2)
    inside, outside = layer_rows(layers)
    assert list(inside) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert inside["v_proj"] == {0: pytest.approx(0.2), 1: pytest.approx(0.2)}
    assert outside == {"lm_head": pytest.approx(0.6)}


def test_the_law_is_fitted_where_runs_tell_it_and_else_its_absence_is_explained(runs):
    law, why = fit_runs(runs, "heldout_loss", "auto")
    assert law is not None
    assert law.words.startswith("L = A / N^alpha with A = ")
    assert "of 4 runs" in law.words
    assert why.startswith("No richer form: L = E + A / N^alpha + B / D^beta needs runs on at least 3 token counts")
    none, why = fit_runs(runs[:3], "heldout_loss", "auto")
    assert none is None
    assert why.startswith("No law: ")
    assert "add runs" in why
    assert fit_runs([run for run in runs if not run.is_finished], "heldout_loss", "auto")[1] == (
        "No law: no run is finished."
    )


def test_the_columns_are_the_series():
    assert ["model", *TABLE] == list(COLUMNS)
