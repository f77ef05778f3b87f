"""The paper's claim as a comparison: do a run's average parameters predict its loss better than its final ones?

Errors are measured on losses that the law was not fitted to, with the same runs held out for both. The paper
(arXiv 2501.12486) reports the errors of its fit itself: 0.016 on average, 0.03 at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.runs.law.fit import Fit, fit_law, identifies, refit
from eval.runs.law.identifiable import check_points
from eval.runs.law.lbfgs import Array
from eval.runs.law.points import Points

NUM_DRAWS = 10_000


def held_out_residuals(fit: Fit, configurations: NDArray[np.intp], num_folds: int | None, seed: int) -> Array:
    """Return measured minus predicted loss of each point, by a law fitted without its fold; NaN if that fit fails.

    A fold is one configuration with all its seeds, or with `num_folds` a random share of the configurations. Seeds stay
    together, because another seed of the same run in the fit would reveal its loss.

    Args:
        fit: The law of all points.
        configurations: The number of each point's configuration.
        num_folds: The number of folds; None: one for each configuration.
        seed: The seed of random folds.

    Raises:
        ValueError: `num_folds` is larger than the number of configurations.
    """
    num = configurations.max() + 1
    if num_folds is not None and num_folds > num:
        raise ValueError(f"num_folds={num_folds} is more than the {num} configurations: take at most {num}, or null.")
    fold_of = np.arange(num)
    if num_folds is not None:
        fold_of = np.random.default_rng(seed).permutation(num) % num_folds
    folds = fold_of[configurations]
    problem = fit.problem
    usable = [fold for fold in range(folds.max() + 1) if identifies(problem, folds != fold)]
    residuals = np.full(len(folds), np.nan)
    if usable:
        laws = refit(fit, np.array([folds != fold for fold in usable], dtype=float))
        for fold, law in zip(usable, laws, strict=True):
            out = folds == fold
            residuals[out] = problem.loss[out] - law.loss(problem.params[out], problem.tokens[out])
    return residuals


def dense_law_residuals(points: Points, average: Fit) -> tuple[Array, Array] | None:
    """Return the sparse runs' residuals under the law of the dense runs, by average and by final parameters.

    Residuals of dense runs are NaN. The result is None if there is no sparse run or no dense one, or if the dense runs do not
    identify a law.
    """
    problem, dense = average.problem, points.percents == 0
    if dense.all() or not dense.any():
        return None
    chosen = problem.params[dense], problem.tokens[dense]
    try:
        check_points(*chosen, problem.form)
    except ValueError:
        return None
    law = fit_law(*chosen, problem.loss[dense], problem.form).law
    residuals = [
        np.where(dense, np.nan, problem.loss - law.loss(points.column(name), problem.tokens))
        for name in ("avg_linear_params", "final_linear_params")
    ]
    return residuals[0], residuals[1]


def paired(
    average: Array, final: Array, configurations: NDArray[np.intp], confidence: float, seed: int
) -> dict[str, Any] | None:
    """Compare the absolute errors by average and by final parameters on the runs that both predict.

    The difference is the final minus the average error; its interval is from resampled configurations. The result is None
    for fewer than two configurations.
    """
    both = np.isfinite(average) & np.isfinite(final)
    chosen = np.unique(configurations[both])
    if len(chosen) < 2:
        return None
    sides = []
    for residuals in (average, final):
        sides.append(np.array([np.abs(residuals[both & (configurations == number)]).mean() for number in chosen]))
    difference = sides[1] - sides[0]
    draws = np.random.default_rng(seed).integers(len(chosen), size=(NUM_DRAWS, len(chosen)))
    tail = 50 * (1 - confidence)
    interval = np.percentile(difference[draws].mean(1), [tail, 100 - tail])
    return {
        "num_runs": int(both.sum()),
        "num_configurations": len(chosen),
        "average_mean_abs_error": float(sides[0].mean()),
        "average_max_abs_error": float(np.abs(average[both]).max()),
        "final_mean_abs_error": float(sides[1].mean()),
        "final_max_abs_error": float(np.abs(final[both]).max()),
        "difference": float(difference.mean()),
        "difference_interval": [float(bound) for bound in interval],
    }


def verdict(pair: dict[str, Any] | None, has_sparse_runs: bool) -> str:
    """Return a sentence that says which of the two predicts better, if the interval of the difference excludes 0."""
    if not has_sparse_runs:
        return "There is no sparse run, so that average and final parameters are the same: nothing is compared."
    if pair is None:
        return "Too few runs can be held out on both sides: nothing is compared."
    low, high = pair["difference_interval"]
    errors = (
        f"held-out error {pair['average_mean_abs_error']:.4f} by average against {pair['final_mean_abs_error']:.4f} by "
        "final parameters"
    )
    if low > 0:
        return f"Average parameters predict the loss better: {errors}."
    if high < 0:
        return f"Final parameters predict the loss better: {errors}."
    return f"These runs do not show which predicts the loss better: {errors}."


def by_sparsity(percents: NDArray[np.intp], residuals: Array, held_out: Array) -> list[dict[str, Any]]:
    """Return mean and size of the residuals at each sparsity in whole per cent, beginning with the dense runs."""
    rows = []
    for percent in np.unique(percents):
        chosen = percents == percent
        outside = np.abs(held_out[chosen][np.isfinite(held_out[chosen])])
        rows.append(
            {
                "sparsity": float(percent) / 100,
                "num_runs": int(chosen.sum()),
                "mean_residual": float(residuals[chosen].mean()),
                "mean_abs_residual": float(np.abs(residuals[chosen]).mean()),
                "max_abs_residual": float(np.abs(residuals[chosen]).max()),
                "heldout_mean_abs_error": float(outside.mean()) if len(outside) else None,
            }
        )
    return rows
