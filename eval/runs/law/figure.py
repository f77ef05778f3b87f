"""The figure of the fitted law: loss against average parameters, and beside it against final parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.runs.law.fit import Fit
from eval.runs.law.identifiable import levels
from eval.runs.law.lbfgs import Array
from eval.runs.law.points import Points
from sparsity.common.text import count_text

MAX_CURVES = 5
MAX_LABELLED = 16
"""The most configurations that are labelled with their sparsity; more labels would not be readable."""
TITLES = {"average": "average linear parameters, N-bar", "final": "final (non-zero) linear parameters"}
COLUMNS = {"average": "avg_linear_params", "final": "final_linear_params"}


def draw_laws(points: Points, figures: dict[str, Any], fits: dict[str, Fit], file: Path) -> None:
    """Draw two panels with one loss axis: dense runs as hollow circles, sparse ones as filled diamonds, coloured by tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    tokens, losses, dense = points.column("total_tokens"), points.column("loss"), points.percents == 0
    curves, configurations = curve_tokens(tokens), points.configurations
    _, first_of_seeds = np.unique(configurations, return_index=True)
    labelled = set(first_of_seeds) if len(first_of_seeds) <= MAX_LABELLED else set()
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axes, side in zip(panels, TITLES, strict=True):
        sizes = points.column(COLUMNS[side])
        for amount in curves if side in fits else ():
            grid = np.geomspace(sizes.min() / 1.15, sizes.max() * 1.15, 200)
            axes.plot(grid, fits[side].law.loss(grid, amount), color=_color(amount, tokens), linewidth=1.8, zorder=1)
        for index, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            color = _color(tokens[index], tokens)
            axes.plot(
                size, loss, linestyle="none", markersize=7.5, markeredgewidth=1.6, markeredgecolor=color, zorder=3,
                marker="o" if dense[index] else "D", markerfacecolor="white" if dense[index] else color,
            )  # fmt: skip
            if not dense[index] and index in labelled:
                axes.annotate(
                    f"{points.percents[index]} %", (size, loss), xytext=(7, 5), textcoords="offset points", fontsize=9
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value, trim=True)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(TITLES[side])
        axes.set_title(_title(side, figures), loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    low, high = losses.min(), losses.max()
    panels[0].set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    panels[0].set_ylabel(f"{figures['loss'].replace('_', ' ')} (nats per token)")
    sparse_run = "sparse run, its final sparsity" if labelled else "sparse run"
    keys = [
        Line2D([], [], linestyle="none", marker="o", markerfacecolor="white", color="0.2", label="dense run"),
        Line2D([], [], linestyle="none", marker="D", color="0.2", label=sparse_run),
        *(
            Line2D([], [], color=_color(amount, tokens), label=f"law at {count_text(amount, trim=True)} tokens")
            for amount in curves
        ),
    ]
    panels[1].legend(handles=keys, frameon=False, fontsize=9, loc="upper right")
    headline = figures["comparison"]["verdict"].split(":")[0]
    figure.suptitle(f"{headline}  ({figures['num_runs']} runs)", x=0.01, ha="left", fontweight="bold")
    try:
        figure.savefig(file, dpi=140)
    finally:
        plt.close(figure)


def curve_tokens(tokens: Array) -> list[float]:
    """Return the token counts for which the law is drawn: those of the runs, or a selection if there are many."""
    numbers = levels(tokens)
    counts = [float(tokens[numbers == number].mean()) for number in range(numbers.max() + 1)]
    if len(counts) <= MAX_CURVES:
        return counts
    return [counts[round(index)] for index in np.linspace(0, len(counts) - 1, MAX_CURVES)]


def _color(amount: float, tokens: Array) -> Any:
    from matplotlib import colormaps

    low, high = np.log(tokens.min()), np.log(tokens.max())
    place = (np.log(amount) - low) / (high - low) if high - low > 0.05 else 0.35
    return colormaps["viridis"](0.85 * float(np.clip(place, 0, 1)))


def _title(side: str, figures: dict[str, Any]) -> str:
    if "refused" in figures[side]:
        return "no law: these runs do not identify it"
    error = figures[side]["heldout"]["mean_abs_error"]
    return figures["formula"] + ("" if error is None else f": held-out error {error:.3f}")
