"""The report on the law as text for people."""

from __future__ import annotations

from typing import Any

from eval.runs.law.law import COEFFICIENTS
from sparsity.common.text import count_text

SIDES = ("average", "final")
PATH_NOTE = (
    "In these runs D follows from N-bar, so A and alpha also include the effect of D: the fit compares average with "
    "final parameters along this path, and predicts nothing beyond it.",
)


def report_text(figures: dict[str, Any]) -> str:
    """Return the fitted law, its residuals and its comparisons as text."""
    parts = [
        f"{figures['formula']}, fitted to {figures['loss']} of {figures['num_runs']} runs "
        f"({figures['num_configurations']} configurations); intervals of {100 * figures['confidence']:g} %, "
        f"{figures['num_bootstrap']} resamples",
        *(PATH_NOTE if figures["tokens_follow_params"] else ()),
        *_trunks(figures),
        _table(figures),
        _residuals(figures),
        *_comparison(figures["comparison"]),
    ]
    for side in SIDES:
        if "refused" in figures[side]:
            parts.append(f"No law on {side} parameters: {figures[side]['refused']}")
        parts += [f"Law on {side} parameters: {warning}" for warning in figures[side].get("warnings", ())]
    if figures["predict"]:
        parts.append(_prediction(figures["predict"]))
    if figures["cheapest"]:
        parts.append(_cheapest(figures["cheapest"]))
    return "\n\n".join(parts)


def _trunks(figures: dict[str, Any]) -> list[str]:
    """Return a note on points that share a trunk; [] if none do."""
    runs, trunks = figures["num_runs"], figures["num_trunks"]
    if trunks == runs:
        return []
    shared = f"{runs} runs branched off {trunks} {'trunk' if trunks == 1 else 'trunks'} and share their steps"
    if figures["resampled"] == "trunks":
        return [f"{shared}: whole trunks are drawn for the intervals."]
    return [
        f"{shared}: the intervals treat them as independent runs and are too narrow, and so is the held-out error. Runs "
        "with other seeds or sizes make them wider."
    ]


def number_text(value: float | None) -> str:
    """Return a number with four significant digits, or words for a bound that is None."""
    return "unbounded" if value is None else f"{value:.4g}" if abs(value) >= 1e-6 else "0"


def _table(figures: dict[str, Any]) -> str:
    """Return a table of coefficients and errors, with a column for each meaning of N."""
    sides = [side for side in SIDES if "refused" not in figures[side]]
    rows = [["", *(f"N = {side} linear parameters" for side in sides)]]
    for name in COEFFICIENTS[figures["form"]]:
        bounds = [[number_text(bound) for bound in figures[side]["intervals"][name]] for side in sides]
        cells = [
            f"{number_text(figures[side][name])}  [{low}, {high}]"
            for side, (low, high) in zip(sides, bounds, strict=True)
        ]
        rows.append([name, *cells])
    for title, outer in (("error of the fit", None), ("held-out error", "heldout")):
        errors = [figures[side][outer] if outer else figures[side] for side in sides]
        rows.append([title, *(_errors(error["mean_abs_error"], error["max_abs_error"]) for error in errors)])
    return _aligned(rows)


def _errors(mean: float | None, most: float | None) -> str:
    return "not available" if mean is None else f"{mean:.4f} on average, {most:.4f} at most"


def _residuals(figures: dict[str, Any]) -> str:
    sides = [side for side in SIDES if "refused" not in figures[side]]
    rows = [["sparsity", "runs", *(f"measured - predicted, {side}" for side in sides)]]
    for lines in zip(*(figures[side]["residuals_by_sparsity"] for side in sides), strict=True):
        cells = [f"{line['mean_residual']:+.4f} (at most {line['max_abs_residual']:.4f})" for line in lines]
        rows.append([f"{lines[0]['sparsity']:.0%}", str(lines[0]["num_runs"]), *cells])
    return _aligned(rows)


def _comparison(comparison: dict[str, Any]) -> list[str]:
    pair, dense = comparison["heldout"], comparison["dense_law_on_sparse_runs"]
    parts = [comparison["verdict"]]
    if pair:
        low, high = pair["difference_interval"]
        parts[0] += f" Difference {pair['difference']:+.4f} [{low:+.4f}, {high:+.4f}] over {pair['num_runs']} runs."
    if dense:
        parts.append(
            f"The law of the dense runs alone misses the loss of the {dense['num_runs']} sparse ones by "
            f"{dense['average_mean_abs_error']:.4f} with average and by {dense['final_mean_abs_error']:.4f} with final "
            "parameters."
        )
    return parts


def _prediction(predict: dict[str, Any]) -> str:
    low, high = predict["interval"]
    run = f"{predict['experiment']}: " if predict["experiment"] else ""
    text = (
        f"Predicted for {run}N-bar {count_text(predict['avg_linear_params'])}, D {count_text(predict['total_tokens'])}: "
        f"loss {predict['loss']:.4f} [{number_text(low)}, {number_text(high)}]"
    )
    text += _extrapolation(predict["outside_the_runs"])
    if predict["measured_final_train_loss"] is not None:
        text += f"; measured final training loss {predict['measured_final_train_loss']:.4f}"
    return text + "."


def _cheapest(cheapest: dict[str, Any]) -> str:
    low, high = (None if bound is None else count_text(bound) for bound in cheapest["avg_linear_params_interval"])
    fixed = "" if cheapest["tokens_are_free"] else ", which this form does not change"
    return (
        f"Loss {cheapest['target_loss']:g} is cheapest with N-bar {count_text(cheapest['avg_linear_params'])} "
        f"[{low or 'unbounded'}, {high or 'unbounded'}] and D "
        f"{count_text(cheapest['total_tokens'])}{fixed}: {cheapest['flops']:.3g} floating-point "
        f"operations (6 N D){_extrapolation(cheapest['outside_the_runs'])}."
    )


def _extrapolation(outside: list[str]) -> str:
    return f"; an extrapolation, the runs do not reach this {' and '.join(outside)}" if outside else ""


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
