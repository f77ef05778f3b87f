"""The figure of a sweep: final loss against average linear parameters, for dense and sparse runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.record.style import BLUE, ORANGE, count_ticks, lighten, pyplot

Figures = Mapping[str, Any]
MAX_LABELLED = 24


def sweep_points(summaries: Sequence[Figures]) -> list[tuple[float, float, float]]:
    """Return (average linear parameters, final training loss, sparsity) of each run with a finite loss, sorted by size."""
    points = [(run["avg_linear_params"], run["final_train_loss"], run["sparsity"]) for run in summaries]
    return sorted(point for point in points if point[1] is not None and math.isfinite(point[1]))


def draw_sweep(summaries: Sequence[Figures], path: Path, title: str) -> None:
    """Draw finished runs: dense ones as hollow circles, sparse ones as filled diamonds labelled with their sparsity."""
    plt = pyplot()
    points = sweep_points(summaries)
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for name, color, marker, face, chosen in (
        ("dense", BLUE, "o", "white", [point for point in points if not point[2]]),
        ("sparse, its final sparsity", ORANGE, "D", ORANGE, [point for point in points if point[2]]),
    ):
        if chosen:
            axes.plot(
                [point[0] for point in chosen], [point[1] for point in chosen], linestyle="none", marker=marker,
                markersize=8, markeredgewidth=1.6, markeredgecolor=color, markerfacecolor=face, label=name,
            )  # fmt: skip
    for size, loss, sparsity in points:
        if sparsity and len(points) <= MAX_LABELLED:
            axes.annotate(
                f"{100 * sparsity:.0f} %", (size, loss), xytext=(8, 5), textcoords="offset points", fontsize=9
            )
    axes.set_xlabel("average linear parameters over the run")
    axes.set_ylabel("final training loss (nats per token)")
    axes.set_title(title, loc="left", fontweight="bold")
    count_ticks(axes.xaxis, 2)
    axes.margins(0.12)
    lighten(axes)
    if points:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)
