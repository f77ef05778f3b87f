"""The law is recovered from runs that follow it, refused if the runs cannot determine it, and compared with others."""

import csv
import json

import numpy as np
import pytest

from conf.schema import ScalingLawConfig
from conf.values import as_typed
from eval.runs.law.claim import held_out_residuals, paired, verdict
from eval.runs.law.fit import Fit, Problem, _grid, _objective, bootstrap, check_exponents, check_hessian, fit_law
from eval.runs.law.identifiable import levels
from eval.runs.law.law import Law
from eval.runs.law.lbfgs import minimise
from eval.runs.law.points import read_points
from eval.runs.law.report import interval
from eval.scaling_law import main
from launch.plan.request import read_request
from tests.commands import run_command
from train.plan.run import plan_run
from train.plan.series import table_row

TRUE = Law.of(A=406.4, alpha=0.34, E=1.69, B=410.7, beta=0.28)
SIZES = (1e6, 3e6, 1e7, 4e7, 1.5e8, 4e8)
TOKENS = (2e7, 1e8, 1e9, 1e10)
AVERAGE_DENSITY = {0.0: 1.0, 0.2: 0.89, 0.4: 0.77, 0.6: 0.61, 0.8: 0.4}


def grid(sizes=SIZES, tokens=TOKENS):
    return tuple(axis.ravel() for axis in np.meshgrid(np.array(sizes, float), np.array(tokens, float)))


def noisy(law, params, tokens, noise, seed=0):
    return law.loss(params, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(params)))


def series(
    law, *, by="avg_linear_params", noise=0.002, sizes=(2e6, 2e7, 2e8), tokens=(2e8, 2e9, 2e10), levels=AVERAGE_DENSITY
):
    """Return rows of runs whose loss follows a law of their average or of their final parameters."""
    rng = np.random.default_rng(0)
    rows = []
    for size in sizes:
        for amount in tokens:
            for sparsity in levels:
                row = {
                    "avg_linear_params": size * AVERAGE_DENSITY[sparsity],
                    "final_linear_params": size * (1 - sparsity),
                }
                loss = float(law.loss(row[by], amount)) * np.exp(noise * rng.standard_normal())
                rows.append(
                    {"run_name": f"r{len(rows)}", **row, "total_tokens": amount, "loss": loss, "sparsity": sparsity}
                )
    return rows


def write_csv(rows, file):
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_run(folder, **figures):
    folder.mkdir(parents=True)
    summary = {
        "run_name": folder.name, "data": "pydocs", "avg_linear_params": 4e5, "nonzero_linear_params": 2e5, "sparsity": 0.8,
        "linear_params": 1e6, "total_tokens": 1e7, "final_train_loss": 3.0, "heldout_loss": 3.1, "heldout_tokens": 300,
        "heldout_bytes": 1000,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **figures}))
    return folder


def json_of(capsys, *arguments):
    main([*arguments, "format=json", "figure=null"])
    return json.loads(capsys.readouterr().out)


def test_minimise_finds_the_valley_of_rosenbrock_from_every_start():
    def rosenbrock(x, _):
        a, b = x.T
        gradient = np.stack([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)], axis=-1)
        return (1 - a) ** 2 + 100 * (b - a**2) ** 2, gradient

    starts = np.array([[-1.2, 1.0], [0.0, 0.0], [3.0, -2.0], [1.0, 1.0]])
    where, value = minimise(rosenbrock, starts, tolerance=1e-16)
    np.testing.assert_allclose(where, np.ones((4, 2)), atol=1e-6)
    assert value.max() < 1e-12


def test_the_best_fit_is_the_minimum_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize")
    params, tokens = grid()
    fit = fit_law(params, tokens, noisy(TRUE, params, tokens, 0.01), "nd")
    weights = np.ones((1, len(params)))

    def objective(theta):
        value, gradient = _objective(fit.problem, theta[None], weights)
        return value[0], gradient[0]

    found = min(optimize.minimize(objective, start, jac=True).fun for start in fit.minima[[0, 8, 24]])
    assert objective(fit.minima[0])[0] == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("form", ["nd", "n", "power"])
def test_the_objectives_gradient_is_that_of_finite_differences(form):
    params, tokens = grid()
    problem = Problem.of(params, tokens, noisy(TRUE, params, tokens, 0.01), form)
    theta = _grid(problem)[[7, 23]] + 0.1
    weights = np.random.default_rng(0).random((2, len(params)))
    _, gradient = _objective(problem, theta, weights)
    for index in range(theta.shape[1]):
        shift = np.zeros(theta.shape[1])
        shift[index] = 1e-6
        up, down = (_objective(problem, theta + sign * shift, weights)[0] for sign in (1, -1))
        np.testing.assert_allclose(gradient[:, index], (up - down) / 2e-6, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("law", "form"),
    [
        (TRUE, "nd"),
        (Law.of(A=2e5, alpha=0.9, E=0.7, B=3000, beta=0.5), "nd"),
        (Law.of(A=406.4, alpha=0.34, E=2.93), "n"),
        (Law.of(A=30.0, alpha=0.12), "power"),
    ],
)
def test_runs_that_follow_a_law_exactly_give_back_its_coefficients(law, form):
    params, tokens = grid() if form == "nd" else grid(tokens=(1e8,))
    fit = fit_law(params, tokens, law.loss(params, tokens), form)
    check_hessian(fit)
    assert fit.law.coefficients == pytest.approx(law.coefficients, rel=1e-4)
    assert np.abs(fit.residuals).max() < 1e-6


@pytest.mark.parametrize("noise", [0.002, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_of_noisy_runs_hold_the_true_coefficients(noise, seed):
    params, tokens = grid()
    fit = fit_law(params, tokens, noisy(TRUE, params, tokens, noise, seed), "nd")
    laws = bootstrap(fit, 200, seed=0)
    assert len(laws) == 200
    for name, true in TRUE.coefficients.items():
        low, high = interval(laws, lambda law, name=name: law.coefficients[name], 0.99)
        assert low <= true <= high, name
        assert low < fit.law.coefficients[name] < high


def test_intervals_grow_with_the_noise():
    params, tokens = grid()
    widths = []
    for noise in (0.001, 0.01):
        fit = fit_law(params, tokens, noisy(TRUE, params, tokens, noise), "nd")
        low, high = interval(bootstrap(fit, 100, seed=0), lambda law: law.alpha, 0.9)
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_one_diverged_run_does_not_move_the_law():
    params, tokens = grid()
    loss = TRUE.loss(params, tokens)
    loss[5] *= 2
    assert fit_law(params, tokens, loss, "nd").law.coefficients == pytest.approx(TRUE.coefficients, rel=0.01)


FIVE = np.geomspace(1e6, 1e8, 5)


@pytest.mark.parametrize(
    ("params", "tokens", "form", "sentence"),
    [
        (*grid((1e6, 2e6), TOKENS), "nd", "at least 3 sizes N .* only 1.00M and 2.00M"),
        (*grid((1e6, 1.04e6, 2e6, 2.05e6), TOKENS), "nd", "at least 3 sizes"),
        (*grid(SIZES, (1e8, 2e9)), "nd", "at least 3 token counts D .* only 0.10B and 2.00B"),
        (*grid(SIZES, (1e8,)), "nd", "only 0.10B: .* or fit form=n"),
        (FIVE, FIVE[[0, 2, 1, 4, 3]] * 20, "nd", "5 coefficients and needs at least 6 runs .* have 5"),
        (np.tile(FIVE, 3), np.tile(FIVE[[0, 2, 1, 4, 3]] * 20, 3), "nd", "have 5: add runs, seeds do not count"),
        (np.geomspace(1e6, 1e9, 9), 20 * np.geomspace(1e6, 1e9, 9), "nd", r"D follows from N .* \+1.00 log N"),
        (np.geomspace(1e6, 1e9, 9), 1e17 / np.geomspace(1e6, 1e9, 9), "nd", r"D follows from N .* -1.00 log N"),
        (*grid(SIZES, (1e8, 2e8)), "n", "form=n is for runs on equally many tokens, and these have 0.10B to 0.20B"),
        (*grid(SIZES[:3], (1e8,)), "n", "3 coefficients and needs at least 4 runs"),
        (np.full(9, 1e6), np.full(9, 1e8), "power", "at least 2 sizes"),
    ],
)
def test_runs_that_cannot_tell_the_coefficients_are_refused(params, tokens, form, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        fit_law(params, tokens, TRUE.loss(params, tokens), form)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("law", "form", "sentence"),
    [
        (Law.of(A=30, alpha=0.1), "n", "its term E vanishes.* or fit form=power"),
        (Law.of(A=1e-9, alpha=0.1, E=2.0, B=400, beta=0.3), "nd", "do not identify E, A, alpha, B, beta"),
    ],
)
def test_a_minimum_without_a_term_is_refused(law, form, sentence):
    params, tokens = grid() if form == "nd" else grid(tokens=(1e8,))
    fit = fit_law(params, tokens, law.loss(params, tokens), form)
    with pytest.raises(ValueError, match=sentence):
        check_hessian(fit)


@pytest.mark.parametrize(("form", "name"), [("n", "alpha"), ("nd", "beta")])
def test_an_exponent_that_no_law_has_is_refused(form, name):
    params, tokens = grid(SIZES, np.geomspace(1e8, 1e9, 4)) if form == "nd" else grid(np.geomspace(1e6, 3e6, 6), (1e8,))
    steep = (tokens / 1e8) ** -7.0 + (params / 1e6) ** -0.5 if form == "nd" else (params / 1e6) ** -17.0
    fit = fit_law(params, tokens, 2.0 + steep, form)
    with pytest.raises(ValueError, match=rf"has {name}=[\d.]+, above 4, but measured exponents are below 1") as error:
        check_exponents(fit)
    assert str(error.value).count(". ") == 0


def test_runs_whose_law_is_absurd_are_refused_on_either_side(tmp_path, capsys):
    rows = [
        {
            "avg_linear_params": size, "final_linear_params": 1e6 * (size / 1e6) ** 0.1, "total_tokens": 1e8,
            "loss": 2.0 + (size / 1e6) ** -0.8, "sparsity": 0.5,
        }
        for size in np.geomspace(1e6, 1e8, 6)
    ]  # fmt: skip
    figures = json_of(capsys, f"runs={write_csv(rows, tmp_path / 'runs.csv')}", "form=n", "num_bootstrap=20")
    assert figures["average"]["alpha"] == pytest.approx(0.8, rel=1e-3)
    assert "has alpha=8, above 4" in figures["final"]["refused"]
    for row in rows:
        row["avg_linear_params"], row["final_linear_params"] = row["final_linear_params"], row["avg_linear_params"]
    with pytest.raises(SystemExit):
        main([f"runs={write_csv(rows, tmp_path / 'turned.csv')}", "form=n", "figure=null"])
    assert "has alpha=8, above 4" in capsys.readouterr().err


def test_a_level_spans_five_per_cent():
    assert levels(np.array([100.0, 1.0, 1.04, 1.06, 104.0, 1.049])).tolist() == [2, 0, 0, 1, 2, 0]


def test_the_cheapest_run_costs_no_more_than_any_other_of_its_loss():
    params, tokens = TRUE.cheapest(2.5)
    assert float(TRUE.loss(params, tokens)) == pytest.approx(2.5)
    others = params * np.geomspace(0.5, 2, 1001)
    spare = 2.5 - 1.69 - 406.4 * others**-0.34
    cost = others[spare > 0] * (spare[spare > 0] / 410.7) ** (-1 / 0.28)
    assert cost.min() == pytest.approx(params * tokens, rel=1e-5)
    assert cost.min() >= params * tokens * (1 - 1e-12)


@pytest.mark.parametrize(
    ("law", "target", "sentence"),
    [(TRUE, 1.6, "not above E=1.69"), (Law.of(A=4, alpha=-0.1, B=9, beta=0.3, E=1), 5, "no cheapest run")],
)
def test_a_loss_out_of_reach_has_no_cheapest_run(law, target, sentence):
    with pytest.raises(ValueError, match=sentence):
        law.cheapest(target)


def test_without_free_tokens_the_cheapest_is_the_only_size():
    params, tokens = Law.of(A=406.4, alpha=0.34, E=2.93).cheapest(5.0)
    assert tokens is None
    assert float(Law.of(A=406.4, alpha=0.34, E=2.93).loss(params, 1.0)) == pytest.approx(5.0)


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
    assert "needs a law in N and D, and in these runs D follows from N" in capsys.readouterr().err


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


def test_runs_are_read_from_folders_sweeps_patterns_and_csv_and_count_once(tmp_path):
    for job in ("target=0", "target=0.8"):
        write_run(tmp_path / "sweep" / job)
    (tmp_path / "sweep" / "unfinished").mkdir()
    write_run(tmp_path / "one", run_name=None)
    file = write_csv(series(TRUE)[:2], tmp_path / "more.csv")
    names = [str(tmp_path / "sweep"), str(tmp_path / "sweep" / "target=*"), str(tmp_path / "one")]
    points = read_points(names)
    assert [point.name for point in points.points] == ["target=0", "target=0.8", "one"]
    assert points.loss_name == "heldout_loss"
    assert points.points[0].final_linear_params == 2e5
    assert points.points[0].loss == 3.1
    assert len(read_points([str(file), str(file)]).points) == 2
    assert read_points(names, loss="final_train_loss").points[2].loss == 3.0
    assert points.configurations.tolist() == [0, 0, 0]


def test_a_table_as_the_cards_write_it_is_read(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text(
        "model,linear_params,avg_linear_params,nonzero_linear,sparsity,total_tokens,final_train_loss\n"
        "sparsellm-1b-80p,1.14B,0.45B,0.23B,80.00%,200.4B,2.228\n"
    )
    (point,) = read_points([str(file)]).points
    assert point.name == "sparsellm-1b-80p"
    assert (point.avg_linear_params, point.total_tokens, point.sparsity) == pytest.approx((4.5e8, 2.004e11, 0.8))


def test_sparsity_follows_from_the_linear_parameters(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("avg_linear_params,final_linear_params,linear_params,total_tokens,loss\n4e5,2e5,1e6,1e7,3\n")
    assert read_points([str(file)]).points[0].sparsity == pytest.approx(0.8)


HEADER = "avg_linear_params,final_linear_params,total_tokens,loss,sparsity,data"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([HEADER], "holds no finished run"),
        ([HEADER, "abc,2e5,1e7,3,0.8,"], "line 2 has avg_linear_params=abc, which is not a number"),
        ([HEADER, "4e5,2e5,1e7,nan,0.8,"], "loss=nan, which is not a finite number above 0"),
        ([HEADER, "4e5,2e5,0,3,0.8,"], "total_tokens=0"),
        ([HEADER, "4e5,2e5,1e7,3,1.8,"], "sparsity=1.8, outside"),
        ([HEADER, "4e5,2e5,1e7,3,,"], "is sparse, and nothing says how much"),
        ([HEADER, "4e5,,1e7,3,0.8,"], "no figure final_linear_params: give a column nonzero_linear_params or"),
        ([HEADER, "4e5,2e5,1e7,,0.8,"], "none of loss, heldout_loss, final_train_loss in common"),
        ([HEADER, "4e5,2e5,1e7,3,0.8,pydocs", "4e5,2e5,1e7,3,0.8,text"], "trained on pydocs and text"),
    ],
)
def test_a_figure_that_is_wrong_or_missing_is_named(lines, sentence, tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=sentence):
        read_points([str(file)])


def test_runs_of_two_tokenizers_are_not_compared(tmp_path):
    names = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", heldout_tokens=250))]
    with pytest.raises(ValueError, match="give runs of one tokenizer"):
        read_points(names)


def test_a_place_that_is_not_there_is_named(tmp_path):
    (tmp_path / "note.txt").write_text("")
    for name, sentence in (("missing", "is not there"), ("note.txt", "is not a run"), (".", "holds no finished run")):
        with pytest.raises(ValueError, match=sentence):
            read_points([str(tmp_path / name)])


def test_a_planned_run_is_predicted_at_the_plans_average_size_and_tokens(tmp_path, capsys):
    file = write_csv(series(TRUE, noise=0, sizes=(1e8, 1e9, 1e10), tokens=(1e10, 1e11, 1e12)), tmp_path / "runs.csv")
    asked = ["predict.experiment=sparsellm-1b-80p", "predict.overrides=[sparsity.target=0.6]"]
    figures = json_of(capsys, f"runs={file}", "num_bootstrap=20", "target_loss=2.1", *asked)
    (run,) = read_request(["experiment=sparsellm-1b-80p", "sparsity.target=0.6"]).runs
    row = table_row(run, plan_run(run, 1))
    predict = figures["predict"]
    assert predict["avg_linear_params"] == row["avg_linear_params"]
    assert predict["total_tokens"] == row["total_tokens_true"]
    assert predict["loss"] == pytest.approx(
        float(TRUE.loss(row["avg_linear_params"], row["total_tokens_true"])), rel=1e-4
    )
    assert predict["outside_the_runs"] == []
    params, tokens = TRUE.cheapest(2.1)
    cheapest = figures["cheapest"]
    assert (cheapest["avg_linear_params"], cheapest["total_tokens"]) == pytest.approx((params, tokens), rel=1e-2)
    assert cheapest["flops"] == pytest.approx(6 * params * tokens, rel=1e-2)


def test_a_law_without_tokens_predicts_at_its_own_token_count_only(tmp_path, capsys):
    law = Law.of(A=300, alpha=0.34, E=2.0)
    file = write_csv(series(law, sizes=(1e6, 4e6), tokens=(1e7,), noise=0), tmp_path / "runs.csv")
    asked = [f"runs={file}", "form=n", "num_bootstrap=20", "predict.avg_linear_params=9e6"]
    predict = json_of(capsys, *asked, "predict.total_tokens=1e7")["predict"]
    assert predict["loss"] == pytest.approx(float(law.loss(9e6, 1.0)), rel=1e-3)
    assert predict["outside_the_runs"] == ["N"]
    with pytest.raises(SystemExit):
        main([*asked, "predict.total_tokens=2e7", "figure=null"])
    assert "form=n holds for runs on 10.00M tokens, not on 20.00M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "runs=[] names nothing"),
        (["runs=x", "form=dn"], "form=dn is not known: choose one of nd, n, power"),
        (["runs=x", "confidence=95"], "confidence=95.0 is outside (0, 1)"),
        (["runs=x", "predict.total_tokens=3"], "needs both predict.avg_linear_params and predict.total_tokens"),
        (["runs=x", "predict.experiment=demo", "predict.total_tokens=3"], "already says size and tokens"),
        (["runs=x", "predict.overrides=[a=1]"], "changes an experiment: name it"),
        (["runs=no-such-folder"], "runs=no-such-folder is not there"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("runs=runs/a", "runs=[runs/a]"),
        ("runs=a/target=0.8,b*", "runs=['a/target=0.8',b*]"),
        ("runs=[a, b=1]", "runs=[a,'b=1']"),
        ("runs=['a,b']", "runs=['a,b']"),
        ("predict.overrides=[sparsity.target=0.6]", "predict.overrides=['sparsity.target=0.6']"),
        ("form=n", "form=n"),
    ],
)
def test_paths_with_equals_signs_need_no_quotes(argument, quoted):
    assert as_typed(argument, ScalingLawConfig) == quoted


def test_the_command_writes_json_alone_and_a_figure(tmp_path):
    file = write_csv(series(TRUE), tmp_path / "runs.csv")
    run = run_command(["eval.scaling_law", f"runs={file}", "format=json", "num_bootstrap=20"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["num_runs"] == len(figures["points"]) == 45
    assert set(figures["average"]["intervals"]) == {"E", "A", "alpha", "B", "beta"}
    assert (tmp_path / "scaling_law.png").stat().st_size > 10_000


def test_runs_of_one_trunk_are_drawn_together(tmp_path):
    from eval.runs.law.points import read_points

    for number, (size, steps) in enumerate((size, steps) for size in (1e6, 2e6, 4e6, 8e6, 16e6) for steps in (1, 2, 4)):
        summary = {
            "avg_linear_params": size, "nonzero_linear_params": size, "linear_params": size, "total_tokens": 1e8 * steps,
            "heldout_loss": float(TRUE.loss(np.array([size]), np.array([1e8 * steps]))[0]),
            "branch": {"run": "trunk", "step": 1, "trunk": f"/runs/trunk-{size:g}"},
        }  # fmt: skip
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(summary))
    points = read_points([str(tmp_path)])
    trunks = points.trunks
    assert len(set(trunks.tolist())) == 5
    assert all(len(set(trunks[points.column("avg_linear_params") == size].tolist())) == 1 for size in (1e6, 16e6))
    params, tokens = points.column("avg_linear_params"), points.column("total_tokens")
    fit = fit_law(params, tokens, noisy(TRUE, params, tokens, 0.003), "nd")
    together, apart = (interval(bootstrap(fit, 60, 0, groups), lambda law: law.alpha, 0.9) for groups in (trunks, None))
    assert together != apart


def test_a_report_says_what_a_shared_trunk_does_to_its_intervals():
    from eval.runs.law.text import _trunks

    assert _trunks({"num_runs": 6, "num_trunks": 6, "resampled": "points"}) == []
    assert "whole trunks are drawn" in _trunks({"num_runs": 15, "num_trunks": 5, "resampled": "trunks"})[0]
    assert "too narrow" in _trunks({"num_runs": 6, "num_trunks": 1, "resampled": "points"})[0]
