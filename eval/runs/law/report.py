"""The report on the law of a set of runs: the fits by average and by final parameters, their comparison, predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from conf.compose import composed
from conf.schema import PredictConfig, ScalingLawConfig
from eval.runs.law.claim import by_sparsity, dense_law_residuals, held_out_residuals, paired, verdict
from eval.runs.law.fit import Fit, Problem, bootstrap, check_exponents, check_hessian, fit_law
from eval.runs.law.identifiable import SAME_TOKENS, tokens_follow
from eval.runs.law.law import FLOPS_PER_PARAM_TOKEN, FORMULAS, Form, Law
from eval.runs.law.lbfgs import Array
from eval.runs.law.points import Points
from sparsity.common.text import count_text
from train.plan.run import plan_run
from train.plan.series import table_row

MIN_TRUNKS = 5
"""With fewer independent runs than this, resampling whole trunks does not tell the spread."""


def report(config: ScalingLawConfig, points: Points) -> tuple[dict[str, Any], dict[str, Fit]]:
    """Return (figures, fits) of the points. Losses are in nats per token; `average` and `final` are the two meanings of N.

    If only the law on final parameters cannot be fitted, `final` holds the reason as `refused`.

    Raises:
        ValueError: The points do not identify the law on average parameters.
    """
    form: Form = config.form  # type: ignore[assignment]
    tokens, loss, configurations = points.column("total_tokens"), points.column("loss"), points.configurations
    is_path = form != "nd" and tokens_follow(points.column("avg_linear_params"), tokens)
    if is_path:
        _check_path(config)
        # In these runs D is not an independent variable, so the law in N alone describes the losses along their path.
        tokens = np.full_like(tokens, tokens.mean())
    fits = {"average": fit_law(points.column("avg_linear_params"), tokens, loss, form)}
    check_hessian(fits["average"])
    check_exponents(fits["average"])
    sides: dict[str, dict[str, Any]] = {}
    try:
        final = fit_law(points.column("final_linear_params"), tokens, loss, form)
        check_exponents(final)
        fits["final"] = final
    except ValueError as error:
        sides["final"] = {"refused": str(error)}
    held_out = {
        side: held_out_residuals(fit, configurations, config.num_folds, config.seed) for side, fit in fits.items()
    }
    trunks = points.trunks
    num_trunks = int(trunks.max()) + 1
    groups = trunks if num_trunks >= MIN_TRUNKS else None
    laws = {side: bootstrap(fit, config.num_bootstrap, config.seed, groups) for side, fit in fits.items()}
    for side, fit in fits.items():
        sides[side] = _side(fit, laws[side], held_out[side], points, config.confidence)
    figures: dict[str, Any] = {
        "form": form,
        "formula": FORMULAS[form],
        "tokens_follow_params": is_path,
        "loss": points.loss_name,
        "num_runs": len(points.points),
        "num_configurations": int(configurations.max()) + 1,
        "num_trunks": num_trunks,
        "resampled": "points" if groups is None else "trunks",
        "confidence": config.confidence,
        "num_bootstrap": config.num_bootstrap,
        "average": sides["average"],
        "final": sides["final"],
        "comparison": _comparison(points, fits, held_out, config),
        "predict": None,
        "cheapest": None,
    }
    if config.predict.is_asked:
        figures["predict"] = _prediction(config.predict, fits["average"], laws["average"], config.confidence)
    if config.target_loss is not None:
        figures["cheapest"] = _cheapest(config.target_loss, fits["average"], laws["average"], config.confidence)
    figures["points"] = _points(points, fits, held_out)
    return figures, fits


def _check_path(config: ScalingLawConfig) -> None:
    """Raise a ValueError if a requested figure needs the separate effects of N and D."""
    asked = [
        key for key, is_asked in (("predict", config.predict.is_asked), ("target_loss", config.target_loss)) if is_asked
    ]
    if asked:
        raise ValueError(
            f"{asked[0]} needs a law in N and D, and in these runs D follows from N, so that form={config.form} describes "
            "them only along that path: add runs of the same size on other token counts and fit form=nd."
        )


def interval(laws: Sequence[Law], value: Callable[[Law], float], confidence: float) -> list[float | None]:
    """Return the central interval with the share `confidence` of a value over resampled laws; None for infinite bounds."""
    values = np.array([value(law) for law in laws])
    tail = (1 - confidence) / 2
    bounds = np.quantile(values, [tail, 1 - tail], method="nearest")
    return [float(bound) if math.isfinite(bound) else None for bound in bounds]


def _side(fit: Fit, laws: list[Law], held_out: Array, points: Points, confidence: float) -> dict[str, Any]:
    def coefficient(name: str) -> Callable[[Law], float]:
        return lambda law: law.coefficients[name]

    names, size, outside = list(fit.law.coefficients), np.abs(fit.residuals), np.abs(held_out[np.isfinite(held_out)])
    intervals = {name: interval(laws, coefficient(name), confidence) for name in names}
    warnings = []
    try:
        check_hessian(fit)
    except ValueError as error:
        warnings.append(str(error))
    for name in {"alpha", "beta"} & set(names):
        low, high = intervals[name]
        if low is None or high is None or high - low > abs(fit.law.coefficients[name]):
            warnings.append(f"{name} is hardly known: its interval is wider than its value.")
    return {
        **fit.law.coefficients,
        "intervals": intervals,
        "huber": fit.huber,
        "mean_abs_error": float(size.mean()),
        "max_abs_error": float(size.max()),
        "heldout": {
            "num_runs": len(outside),
            "mean_abs_error": float(outside.mean()) if len(outside) else None,
            "max_abs_error": float(outside.max()) if len(outside) else None,
        },
        "residuals_by_sparsity": by_sparsity(points.percents, fit.residuals, held_out),
        "warnings": sorted(warnings),
    }


def _comparison(
    points: Points, fits: dict[str, Fit], held_out: dict[str, Array], config: ScalingLawConfig
) -> dict[str, Any]:
    """Compare average and final parameters on the same held-out runs, and on sparse runs under the law of the dense ones."""
    configurations, has_sparse = points.configurations, bool(points.percents.any())
    pair = None
    if has_sparse and "final" in fits:
        pair = paired(held_out["average"], held_out["final"], configurations, config.confidence, config.seed)
    dense_law = dense_law_residuals(points, fits["average"])
    return {
        "verdict": verdict(pair, has_sparse),
        "heldout": pair,
        "dense_law_on_sparse_runs": dense_law and paired(*dense_law, configurations, config.confidence, config.seed),
    }


def _prediction(asked: PredictConfig, fit: Fit, laws: list[Law], confidence: float) -> dict[str, Any]:
    """Return the loss of a planned run with the law's interval, which does not include the noise of a single run."""
    if asked.experiment is None:
        assert asked.avg_linear_params is not None
        assert asked.total_tokens is not None
        params, tokens, measured = asked.avg_linear_params, asked.total_tokens, None
    else:
        run = composed("train", [f"experiment={asked.experiment}", *asked.overrides])
        row = table_row(run, plan_run(run, run.launch.num_processes or 1))
        params, tokens, measured = row["avg_linear_params"], float(row["total_tokens_true"]), row["final_train_loss"]
    seen = fit.problem
    if fit.law.form != "nd" and max(tokens / seen.tokens.min(), seen.tokens.max() / tokens) > 1 + SAME_TOKENS:
        raise ValueError(
            f"form={fit.law.form} holds for runs on {count_text(seen.tokens.mean())} tokens, not on {count_text(tokens)}: "
            "ask for a run on as many, or fit form=nd to runs on several token counts."
        )
    return {
        "experiment": asked.experiment,
        "avg_linear_params": params,
        "total_tokens": tokens,
        "loss": float(fit.law.loss(params, tokens)),
        "interval": interval(laws, lambda law: float(law.loss(params, tokens)), confidence),
        "outside_the_runs": _outside(seen, params, tokens),
        "measured_final_train_loss": measured,
    }


def _cheapest(target: float, fit: Fit, laws: list[Law], confidence: float) -> dict[str, Any]:
    """Return the average size and the number of tokens that reach a loss with the least compute."""
    params, tokens = fit.law.cheapest(target)
    spent = float(fit.problem.tokens.mean()) if tokens is None else tokens

    def size(law: Law) -> float:
        try:
            return law.cheapest(target)[0]
        except ValueError:
            return math.inf

    return {
        "target_loss": target,
        "avg_linear_params": params,
        "avg_linear_params_interval": interval(laws, size, confidence),
        "total_tokens": spent,
        "flops": FLOPS_PER_PARAM_TOKEN * params * spent,
        "tokens_are_free": tokens is not None,
        "outside_the_runs": _outside(fit.problem, params, spent),
    }


def _outside(seen: Problem, params: float, tokens: float) -> list[str]:
    """Return those of N and D that are outside the range of the fitted runs, so that the law extrapolates."""
    ranges = (("N", params, seen.params), ("D", tokens, seen.tokens))
    return [
        name
        for name, value, known in ranges
        if not known.min() / (1 + SAME_TOKENS) <= value <= known.max() * (1 + SAME_TOKENS)
    ]


def _points(points: Points, fits: dict[str, Fit], held_out: dict[str, Array]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [vars(point).copy() for point in points.points]
    for side, fit in fits.items():
        for row, residual, outside in zip(rows, fit.residuals, held_out[side], strict=True):
            row[f"residual_{side}"] = float(residual)
            row[f"heldout_residual_{side}"] = float(outside) if math.isfinite(outside) else None
    return rows
