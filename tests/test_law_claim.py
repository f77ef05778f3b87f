"""The comparison of laws of average and of final parameters, on runs held out by configuration."""

import numpy as np
import pytest

from eval.runs.law.claim import held_out_residuals, paired, verdict
from eval.runs.law.fit import Fit, fit_law
from eval.runs.law.law import Law
from eval.scaling_law import main
from tests.law_runs import TRUE, json_of, series, write_csv


def seeds_with_one_odd_configuration() -> tuple[Fit, np.ndarray]:
    params = np.repeat(np.geomspace(1e6, 1e8, 7), 3)
    law = Law.of(A=406.4, alpha=0.34, E=2.0)
    loss = law.loss(params, 1e8)
    loss[9:12] += 0.5
    return fit_law(params, np.full(21, 1e8), loss, "n"), np.repeat(np.arange(7), 3)


def test_seeds_of_a_run_are_held_out_together():
    fit, configurations = seeds_with_one_odd_configuration()
    residuals = held_out_residuals(fit, configurations, None, seed=0)
    np.testing.assert_allclose(residuals[9:12], 0.5, atol=1e-3)
    kept = np.delete(residuals, slice(9, 12))
    assert np.abs(kept).max() < 0.05


def test_every_configuration_is_in_one_of_k_folds():
    fit, configurations = seeds_with_one_odd_configuration()
    residuals = held_out_residuals(fit, configurations, 3, seed=0)
    assert np.isfinite(residuals).all()
    with pytest.raises(ValueError, match="num_folds=8 is more than the 7"):
        held_out_residuals(fit, configurations, 8, seed=0)


def test_a_fold_that_leaves_too_little_predicts_nothing():
    params = np.array([1e6, 2e6, 4e6, 4.01e6])
    tokens = np.full(4, 1e8)
    fit = fit_law(params, tokens, TRUE.loss(params, tokens), "power")
    assert np.isfinite(held_out_residuals(fit, np.array([0, 1, 2, 2]), None, seed=0)).all()
    assert np.isnan(held_out_residuals(fit, np.array([0, 0, 1, 1]), None, seed=0)[:2]).all()


def test_paired_errors_count_each_configuration_once():
    average, final = np.array([0.1, -0.1, 0.2, 9.0]), np.array([0.3, 0.3, -0.2, np.nan])
    pair = paired(average, final, np.array([0, 0, 1, 2]), 0.95, seed=0)
    assert pair["num_runs"] == 3
    assert pair["average_mean_abs_error"] == pytest.approx(0.15)
    assert pair["final_mean_abs_error"] == pytest.approx(0.25)
    assert pair["difference"] == pytest.approx(0.1)
    assert "do not show" in verdict(pair, True)


@pytest.mark.parametrize(("by", "better"), [("avg_linear_params", "Average"), ("final_linear_params", "Final")])
def test_the_comparison_finds_which_parameters_the_runs_follow(by, better, tmp_path, capsys):
    figures = json_of(capsys, f"runs={write_csv(series(TRUE, by=by), tmp_path / 'runs.csv')}", "num_bootstrap=20")
    comparison = figures["comparison"]
    assert comparison["verdict"].startswith(f"{better} parameters predict the loss better")
    sides = {"Average": "average", "Final": "final"}
    side = sides.pop(better)
    (other,) = sides.values()
    for pair in (comparison["heldout"], comparison["dense_law_on_sparse_runs"]):
        assert pair[f"{side}_mean_abs_error"] < 0.2 * pair[f"{other}_mean_abs_error"]
    rows = figures[other]["residuals_by_sparsity"]
    assert [row["sparsity"] for row in rows] == [0, 0.2, 0.4, 0.6, 0.8]
    assert all(row["num_runs"] == 9 for row in rows)
    assert abs(rows[0]["mean_residual"] - rows[-1]["mean_residual"]) > 0.2


def test_the_published_losses_follow_average_parameters_rather_than_final_ones(capsys):
    figures = json_of(capsys, "runs=docs/cards.csv", "form=power")
    assert figures["tokens_follow_params"] is True
    assert figures["average"]["heldout"]["mean_abs_error"] == pytest.approx(0.0068, abs=1e-4)
    assert figures["final"]["heldout"]["mean_abs_error"] == pytest.approx(0.0291, abs=1e-4)
    assert figures["comparison"]["heldout"]["difference_interval"][0] > 0


@pytest.mark.parametrize("asked", ["target_loss=2.2", "predict.experiment=sparsellm-1b-60p"])
def test_runs_whose_tokens_follow_their_sizes_predict_no_others(capsys, asked):
    with pytest.raises(SystemExit):
        main(["runs=docs/cards.csv", "form=power", "figure=null", asked])
    assert "needs a law in N and D, but in these runs D follows from N" in capsys.readouterr().err


def test_dense_runs_alone_compare_nothing(tmp_path, capsys):
    rows = series(TRUE, sizes=(1e6, 1e7, 1e8), levels=(0.0,))
    figures = json_of(capsys, f"runs={write_csv(rows, tmp_path / 'runs.csv')}", "num_bootstrap=20")
    assert "no sparse run" in figures["comparison"]["verdict"]
    assert figures["comparison"]["heldout"] is None


def test_runs_of_one_final_size_have_a_law_of_their_average(tmp_path, capsys):
    law = Law.of(A=300, alpha=0.34, E=2.0)
    rows = series(law, sizes=(1e6,), tokens=(1e7,), noise=0)
    for row in rows:
        row["final_linear_params"] = 1e5
    file = write_csv(rows, tmp_path / "runs.csv")
    arguments = [f"runs={file}", "form=n", "num_bootstrap=20"]
    figures = json_of(capsys, *arguments)
    assert figures["average"]["alpha"] == pytest.approx(0.34, rel=1e-3)
    assert "at least 3 sizes" in figures["final"]["refused"]
    main([*arguments, f"figure={tmp_path / 'new' / 'law.png'}"])
    text = capsys.readouterr().out
    assert "No law on final parameters" in text
    assert (tmp_path / "new" / "law.png").read_bytes().startswith(b"\x89PNG")
