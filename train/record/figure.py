"""report.png: loss and density over tokens, the prune window shaded, the average density marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsity.common.text import count_text, half_up
from train.record.style import BLUE, GREY, ORANGE, count_ticks, lighten, pyplot


def draw_report(records: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> None:
    """Draw a run's report from its records and summary, and write it to `path`."""
    plt = pyplot()
    steps = [record for record in records if "train/loss" in record]
    tokens = [record["train/tokens"] for record in steps]
    batch = summary["batch_tokens"]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, 6.4), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    upper.plot(tokens, [record["train/loss"] for record in steps], color=BLUE, linewidth=1.8, label="training loss")
    _mark_heldout(upper, summary, ORANGE)
    upper.set_ylabel("loss (nats per token)")
    upper.legend(frameon=False, loc="upper right")
    title = f"{summary['run_name']}: {count_text(summary['linear_params'])} linear weights"
    if summary["sparsity"]:
        title += f", {100 * summary['sparsity']:.0f} % of them pruned"
    upper.set_title(title, loc="left", fontweight="bold")

    densities = [record.get("sparsity/density", 1.0) for record in steps]
    lower.step(tokens, densities, where="pre", color=BLUE, linewidth=1.8)
    average = summary["average_density"]
    lower.axhline(average, color=GREY, linestyle="--", linewidth=1)
    lower.annotate(
        f"average density {half_up(average, 3)} = {count_text(summary['avg_linear_params'])} weights",
        xy=(1, average), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
        ha="right", color=GREY,
    )  # fmt: skip
    lower.set_ylim(0, 1.05)
    lower.set_ylabel("density of linear layers")
    lower.set_xlabel("tokens")
    count_ticks(lower.xaxis)
    if summary["prune_start_step"] is not None:
        window = (summary["prune_start_step"] * batch, summary["prune_end_step"] * batch)
        for axes in (upper, lower):
            axes.axvspan(*window, color=ORANGE, alpha=0.12, linewidth=0)
        lower.annotate(
            "prune window", xy=(window[0], 0.03), xytext=(5, 0), textcoords="offset points", color=ORANGE, va="bottom"
        )
    for axes in (upper, lower):
        lighten(axes)
    lower.set_xlim(0, summary["total_tokens"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mark_heldout(axes: Any, summary: dict[str, Any], color: str) -> None:
    axes.plot(
        [summary["total_tokens"]], [summary["heldout_loss"]], marker="o", color=color, linestyle="none", clip_on=False,
        label=f"held-out loss {half_up(summary['heldout_loss'], 3)}",
    )  # fmt: skip
