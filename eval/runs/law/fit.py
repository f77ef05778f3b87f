"""Fitting the law as in approach 3 of Hoffmann et al. (arXiv 2203.15556): the Huber loss of log L, by L-BFGS from a grid.

log L is the log-sum-exp of a - alpha log N, b - beta log D and e, where a, b, e are the logarithms of A, B, E. Many data
sets are fitted at once: a row of weights is one resample of the runs, or one fold, which leaves some runs out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from eval.runs.law.identifiable import check_points
from eval.runs.law.law import COEFFICIENTS, FORMULAS, Form, Law
from eval.runs.law.lbfgs import Array, minimise

HUBER_DELTA = 1e-3
GRID_SCALES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
GRID_FLOORS = (-1.0, -0.5, 0.0, 0.5, 1.0)
GRID_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
"""The starting values of Hoffmann et al. for a and b, for e, and for alpha and beta; all combinations are starts."""
NUM_DESCENTS = 96
"""The number of starts, the best first, from which L-BFGS runs; running it from all 4500 finds no better minimum."""
RESTART_RANKS = (0, 8, 24)
"""A fit to a resample starts from the minima with these ranks in the fit to all points."""
MAX_REDRAWS = 50
SINGULAR = 1e-6
"""Below this ratio of its singular values the Jacobian counts as degenerate."""
LEAST_SHARE = HUBER_DELTA
"""A term whose share of the loss is nowhere above this has vanished, because the objective hardly depends on it."""


LARGEST_EXPONENT = 4.0
"""Twice the steepest start. Every published exponent is below 1, so a steeper fit has followed the noise."""


@dataclass(frozen=True)
class Problem:
    """N, D and L of the points, and as `features` log N, and log D in the form `nd`, centred and scaled."""

    form: Form
    params: Array
    tokens: Array
    loss: Array
    features: Array
    center: Array
    scale: Array

    @classmethod
    def of(cls, params: Array, tokens: Array, loss: Array, form: Form) -> Problem:
        """Return the problem of points N, D and L, with features of mean 0 and deviation 1."""
        logs = np.log(np.stack([params, tokens] if form == "nd" else [params], axis=-1))
        scale = logs.std(0)
        scale = np.where(scale > 0, scale, 1.0)
        return cls(form, params, tokens, loss, (logs - logs.mean(0)) / scale, logs.mean(0), scale)

    @property
    def has_floor(self) -> bool:
        """True if the form has an irreducible loss as its constant term."""
        return self.form != "power"


@dataclass(frozen=True)
class Fit:
    """The law of all points. `minima` [starts, parameters] are the minima that L-BFGS found, the best first."""

    problem: Problem
    law: Law
    minima: Array
    huber: float
    """The objective: the sum of Huber(log predicted - log measured) over the points."""

    @property
    def residuals(self) -> Array:
        """Measured minus predicted loss of each point, in nats per token."""
        return self.problem.loss - self.law.loss(self.problem.params, self.problem.tokens)


def fit_law(params: Array, tokens: Array, loss: Array, form: Form) -> Fit:
    """Fit the law to the points.

    Args:
        params: N of each point.
        tokens: D of each point.
        loss: L of each point, in nats per token.
        form: The form of the law, see `eval.runs.law.law`.

    Raises:
        ValueError: The points do not identify its coefficients.
    """
    check_points(params, tokens, form)
    problem = Problem.of(params, tokens, loss, form)
    weights = np.ones((1, len(loss)))
    grid = _grid(problem)
    promise = _objective(problem, grid, weights)[0]
    starts = grid[np.argsort(promise)[:NUM_DESCENTS]]
    theta, value = _descend(problem, weights, starts)
    order = np.argsort(value[0])
    minima = theta[0, order]
    return Fit(problem, _law(problem, minima[0]), minima, float(value[0, order[0]]) * HUBER_DELTA**2)


def refit(fit: Fit, weights: Array) -> list[Law]:
    """Fit the law with each row of `weights` [rows, points], starting at the fit's minima; a weight of 0 omits a point."""
    starts = fit.minima[[min(rank, len(fit.minima) - 1) for rank in RESTART_RANKS]]
    theta, value = _descend(fit.problem, weights, starts)
    best = theta[np.arange(len(weights)), value.argmin(1)]
    return [_law(fit.problem, row) for row in best]


def bootstrap(fit: Fit, num_resamples: int, seed: int, groups: NDArray[np.intp] | None = None) -> list[Law]:
    """Return the laws of resampled runs, drawn with replacement; a draw that cannot identify the law is drawn again.

    Args:
        fit: The law of all points.
        num_resamples: The number of resamples to draw.
        seed: The seed of the draws.
        groups: The number of each point's group, from 0. Points of one group are drawn together, because they are not
            independent. None draws each point by itself.
    """
    problem, rng = fit.problem, np.random.default_rng(seed)
    groups = np.arange(len(problem.loss)) if groups is None else groups
    num = int(groups.max()) + 1
    weights = np.zeros((num_resamples, len(problem.loss)))
    for row in weights:
        for _ in range(MAX_REDRAWS):
            row[:] = np.bincount(rng.integers(num, size=num), minlength=num)[groups]
            if identifies(problem, row > 0):
                break
    return refit(fit, weights)


def identifies(problem: Problem, chosen: NDArray[np.bool_]) -> bool:
    """Return whether the chosen points can identify the law, even without a run to spare."""
    try:
        check_points(problem.params[chosen], problem.tokens[chosen], problem.form, spare=0)
    except ValueError:
        return False
    return True


def check_hessian(fit: Fit) -> None:
    """Check that no direction in the coefficients leaves every predicted loss unchanged.

    Raises:
        ValueError: The minimum is degenerate.
    """
    names = COEFFICIENTS[fit.problem.form]
    _, shares = _log_predictions(fit.problem, fit.minima[:1])
    jacobian = _jacobian(fit.problem, shares)[0]
    singular = np.linalg.svd(jacobian, compute_uv=False)
    largest = shares[0].max(0)
    terms = [name for name in ("A", "B", "E") if name in names]
    lost = [name for name, share in zip(terms, largest, strict=True) if share < LEAST_SHARE]
    if lost or singular[-1] < SINGULAR * singular[0]:
        what = f"its term {lost[0]} vanishes" if lost else "its Hessian is degenerate"
        reduced = ", or fit form=power" if fit.problem.form == "n" else ""
        raise ValueError(
            f"the points do not identify {', '.join(names)} of {FORMULAS[fit.problem.form]}, because at the best fit "
            f"{what}: add runs over a wider range of sizes{' and tokens' if fit.problem.form == 'nd' else ''}{reduced}."
        )


def check_exponents(fit: Fit) -> None:
    """Check that no exponent is far above every published one, as happens if the runs follow no law.

    Raises:
        ValueError: An exponent is above `LARGEST_EXPONENT`.
    """
    for name in ("alpha", "beta"):
        exponent = fit.law.coefficients.get(name, 0.0)
        if exponent > LARGEST_EXPONENT:
            raise ValueError(
                f"the best fit of {FORMULAS[fit.problem.form]} has {name}={exponent:.3g}, above {LARGEST_EXPONENT:g}, but "
                f"measured exponents are below 1: these points do not identify the law, add runs over a wider range of "
                f"{'tokens' if name == 'beta' else 'sizes'}."
            )


def _grid(problem: Problem) -> Array:
    terms = problem.features.shape[1]
    axes = [GRID_SCALES] * terms + [GRID_FLOORS] * problem.has_floor + [GRID_EXPONENTS] * terms
    theta = np.array(list(product(*axes)))
    theta[:, :terms] -= theta[:, -terms:] * problem.center
    theta[:, -terms:] *= problem.scale
    return theta


def _law(problem: Problem, theta: Array) -> Law:
    terms = problem.features.shape[1]
    exponents = theta[-terms:] / problem.scale
    logs = theta[:terms] + exponents * problem.center
    law = {"a": logs[0], "alpha": exponents[0]}
    if problem.has_floor:
        law["e"] = theta[terms]
    if terms == 2:
        law |= {"b": logs[1], "beta": exponents[1]}
    return Law(problem.form, **{name: float(value) for name, value in law.items()})


def _log_predictions(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Return (log L [rows, points], shares of L [rows, points, terms]) of theta [rows, parameters]: a, b; e; alpha, beta."""
    terms = problem.features.shape[1]
    logs = theta[:, None, :terms] - theta[:, None, -terms:] * problem.features
    if problem.has_floor:
        floor = np.broadcast_to(theta[:, None, terms : terms + 1], (*logs.shape[:2], 1))
        logs = np.concatenate([logs, floor], axis=-1)
    top = logs.max(-1, keepdims=True)
    shares = np.exp(logs - top)
    total = shares.sum(-1, keepdims=True)
    return (top + np.log(total))[..., 0], shares / total


def _jacobian(problem: Problem, shares: Array) -> Array:
    """Return the derivatives of log L by theta, [rows, points, parameters]; those by a, b and e are the shares of L."""
    terms = problem.features.shape[1]
    return np.concatenate([shares, -shares[..., :terms] * problem.features], axis=-1)


def _objective(problem: Problem, theta: Array, weights: Array) -> tuple[Array, Array]:
    """Return, for each data set, the weighted sum of Huber(log L - log measured) in units of delta^2, and its gradient."""
    predicted, shares = _log_predictions(problem, theta)
    off = (predicted - np.log(problem.loss)) / HUBER_DELTA
    size = np.abs(off)
    value = weights * np.where(size <= 1, 0.5 * off**2, size - 0.5)
    pull = weights * np.clip(off, -1, 1) / HUBER_DELTA
    return value.sum(-1), np.einsum("rn,rnp->rp", pull, _jacobian(problem, shares))


def _descend(problem: Problem, weights: Array, starts: Array) -> tuple[Array, Array]:
    """Minimise for every row of weights from every start; return theta [rows, starts, parameters] and objectives."""
    rows, num_starts = len(weights), len(starts)
    theta, value = minimise(
        lambda theta, which: _objective(problem, theta, weights[which // num_starts]), np.tile(starts, (rows, 1))
    )
    return theta.reshape(rows, num_starts, -1), value.reshape(rows, num_starts)
