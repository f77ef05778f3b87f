"""Held-out loss against average linear parameters: the dense curve, and where the sparse runs lie beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.pairs.comparison import Comparison, Run, curve
from eval.pairs.text import settings_text

COLORS = ("#d1495b", "#2e6f95", "#3a7d44", "#8e5ea2", "#b5651d", "#444444")


def draw_pairs(runs: Sequence[Run], comparisons: Sequence[Comparison], file: Path) -> None:
    """Left the losses, every seed a mark; right each configuration's gaps to its twin and to the dense curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dense = [run for run in runs if not run.is_sparse]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(1.2, 1))
    left.plot(*curve(dense), color="#999999", linewidth=1.5, zorder=1)
    left.plot(
        [run.avg_linear_params for run in dense], [run.loss for run in dense], linestyle="none", marker="o",
        markersize=8, markerfacecolor="white", markeredgecolor="#555555", label="dense", zorder=2,
    )  # fmt: skip
    for index, comparison in enumerate(comparisons):
        color = COLORS[index % len(COLORS)]
        label = settings_text(comparison.settings)
        losses = [
            run.loss
            for run in runs
            if run.is_sparse and all(run.settings.get(key) == value for key, value in comparison.settings.items())
        ]
        left.plot(
            [comparison.avg_linear_params] * len(losses), losses, linestyle="none", marker="D", markersize=7, color=color,
            label=label, zorder=3,
        )  # fmt: skip
        for gap, marker, filled in ((comparison.twin_gap, "D", True), (comparison.curve_gap, "o", False)):
            if gap is None:
                continue
            mean, std = (gap, None) if isinstance(gap, float) else (gap.mean, gap.std)
            right.errorbar(
                mean, index + (0.12 if filled else -0.12), xerr=std, color=color, marker=marker, markersize=7, capsize=3,
                markerfacecolor=color if filled else "white",
            )  # fmt: skip
    left.set_xscale("log")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}M"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("average linear parameters, N-bar")
    left.set_ylabel("held-out loss, nats a token")
    left.legend(frameon=False, fontsize=9)
    right.axvline(0, color="#999999", linewidth=1)
    right.set_yticks(range(len(comparisons)), [settings_text(comparison.settings) for comparison in comparisons])
    right.invert_yaxis()
    right.set_xlabel("sparse less dense, nats a token (filled: its twin, hollow: the curve at N-bar)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
