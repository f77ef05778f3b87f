"""The law is recovered from runs that follow it, and refused if the runs cannot determine it."""

import numpy as np
import pytest

from eval.runs.law.fit import Problem, _grid, _objective, bootstrap, check_exponents, check_hessian, fit_law
from eval.runs.law.identifiable import levels
from eval.runs.law.law import Law
from eval.runs.law.lbfgs import minimise
from eval.runs.law.report import interval
from eval.scaling_law import main
from tests.law_runs import SIZES, TOKENS, TRUE, grid, json_of, noisy, write_csv


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
        (np.tile(FIVE, 3), np.tile(FIVE[[0, 2, 1, 4, 3]] * 20, 3), "nd", "have 5: add runs; other seeds do not count"),
        (np.geomspace(1e6, 1e9, 9), 20 * np.geomspace(1e6, 1e9, 9), "nd", r"D follows from N .* \+1.00 log N"),
        (np.geomspace(1e6, 1e9, 9), 1e17 / np.geomspace(1e6, 1e9, 9), "nd", r"D follows from N .* -1.00 log N"),
        (*grid(SIZES, (1e8, 2e8)), "n", "form=n is for runs on equally many tokens, but these have 0.10B to 0.20B"),
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
