"""The figure of the pairs: held-out loss against average linear parameters, and the gaps of the sparse runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.runs.pairs.comparison import Comparison, Trial, curve
from eval.runs.pairs.text import label, usual_settings


def draw_pairs(runs: Sequence[Trial], comparisons: Sequence[Comparison], file: Path) -> None:
    """Draw the losses on the left, a mark for every seed, and on the right each configuration's gaps to twin and curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    usual, colors = usual_settings(comparisons), plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    dense = [run for run in runs if not run.is_sparse]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(1.2, 1))
    left.plot(*curve(dense), color="#999999", linewidth=1.5, zorder=1)
    left.plot(
        [run.avg_linear_params for run in dense], [run.loss for run in dense], linestyle="none", marker="o",
        markersize=8, markerfacecolor="white", markeredgecolor="#555555", label="dense", zorder=2,
    )  # fmt: skip
    for index, comparison in enumerate(comparisons):
        color = colors[index % len(colors)]
        losses = [
            run.loss
            for run in runs
            if run.is_sparse and all(run.settings.get(key) == value for key, value in comparison.settings.items())
        ]
        left.plot(
            [comparison.avg_linear_params] * len(losses), losses, linestyle="none", marker="D", markersize=7, color=color,
            zorder=3,
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
    left.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel("average linear parameters, N-bar")
    left.set_ylabel("held-out loss, nats a token")
    left.legend(frameon=False, fontsize=9)
    right.axvline(0, color="#999999", linewidth=1)
    # The legend names the colors of both panels; a configuration without a gap is only in the left one.
    right.set_yticks(range(len(comparisons)), [label(comparison, usual) for comparison in comparisons])
    for index, words in enumerate(right.get_yticklabels()):
        words.set_color(colors[index % len(colors)])
    right.set_ylim(len(comparisons) - 0.5, -0.5)
    right.set_xlabel("sparse less dense, nats a token\nfilled: its twin, hollow: the dense curve at N-bar")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
