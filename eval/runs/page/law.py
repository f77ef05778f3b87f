"""The law that the page draws through its runs: the richest form that they identify, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.runs.law.figure import curve_tokens
from eval.runs.law.fit import Fit, check_exponents, check_hessian, fit_law
from eval.runs.law.law import FORMULAS, Form
from eval.runs.law.points import Points, read_points
from eval.runs.law.text import number_text
from eval.runs.run import Run
from sparsity.common.text import count_text
from train.record.read import SUMMARY

FORMS: tuple[Form, ...] = ("nd", "n", "power")


@dataclass(frozen=True)
class FittedLaw:
    """A law and the runs that it is fitted to; `words` name its coefficients and its error."""

    fit: Fit
    words: str

    def curves(self) -> list[tuple[str, list[float], list[float]]]:
        """Return (label, N, loss) of the law over the sizes of the runs, for all or a selection of their token counts."""
        sizes, tokens = self.fit.problem.params, self.fit.problem.tokens
        grid = np.geomspace(sizes.min() / 1.1, sizes.max() * 1.1, 60)
        return [
            (f"law at {count_text(amount, 1)} tokens", grid.tolist(), self.fit.law.loss(grid, amount).tolist())
            for amount in curve_tokens(tokens)
        ]


def fit_runs(runs: Sequence[Run], loss: str, form: str) -> tuple[FittedLaw | None, str]:
    """Return the law of the finished runs and the reason why there is none, or no richer one; `form` may be auto."""
    finished = [str(run.folder / SUMMARY) for run in runs if run.is_finished]
    if not finished:
        return None, "No law: no run is finished."
    try:
        points = read_points(finished, loss)
    except ValueError as error:
        return None, f"No law: {error}"
    refusals: list[str] = []
    for tried in FORMS if form == "auto" else (form,):
        try:
            law = fitted(points, tried)  # type: ignore[arg-type]
            return law, f"No richer form: {' '.join(refusals)}" if refusals else ""
        except ValueError as error:
            refusals.append(str(error))
    return None, f"No law: {' '.join(refusals)}"


def fitted(points: Points, form: Form) -> FittedLaw:
    """Fit the law.

    Raises:
        ValueError: The points do not identify the coefficients.
    """
    fit = fit_law(points.column("avg_linear_params"), points.column("total_tokens"), points.column("loss"), form)
    check_hessian(fit)
    check_exponents(fit)
    coefficients = ", ".join(f"{name} = {number_text(value)}" for name, value in fit.law.coefficients.items())
    off = np.abs(fit.residuals)
    words = (
        f"{FORMULAS[form]} with {coefficients}, fitted to {points.loss_name} of {len(points.points)} runs and off by "
        f"{off.mean():.4f} on average, {off.max():.4f} at most."
    )
    return FittedLaw(fit, words)
