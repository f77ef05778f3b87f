"""Held-out loss against N-bar and against training FLOPs: one labelled point for each method, with its spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.runs.methods.comparison import Entry
from train.record.style import BLUE, GREY, ORANGE, count_ticks, lighten, pyplot

LABEL_SIZE = 8.5
LABEL_OFFSET = 7
"""Points between a mark and its label."""


def draw_methods(entries: Sequence[Entry], file: Path) -> None:
    """Draw the entries: hollow circles are dense, filled diamonds sparse, bars one standard deviation over seeds."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), sharey=True, layout="constrained")
    for axes, key, label in (
        (panels[0], "avg_linear_params", "average linear parameters, N-bar"),
        (panels[1], "flops_average", "training FLOPs of active weights"),
    ):
        known = [entry for entry in entries if getattr(entry, key) is not None]
        for entry in known:
            color = ORANGE if entry.is_sparse else BLUE
            axes.errorbar(
                getattr(entry, key), entry.loss.mean, yerr=entry.loss.std, color=color, ecolor=f"{color}80",
                marker="D" if entry.is_sparse else "o", markersize=6, capsize=3, linewidth=1,
                markerfacecolor=ORANGE if entry.is_sparse else "white",
            )  # fmt: skip
        axes.set_xlabel(label)
        axes.margins(x=0.1)
        lighten(axes)
    count_ticks(panels[0].xaxis, 0)
    panels[0].set_ylabel("held-out loss, nats a token")
    figure.canvas.draw()
    for axes, key in zip(panels, ("avg_linear_params", "flops_average"), strict=True):
        _label(axes, [(getattr(e, key), e.loss.mean, e.name) for e in entries if getattr(e, key) is not None])
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(file, dpi=120)
    finally:
        plt.close(figure)


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name beside each point, moved up or down where names would overlap, with a line back to its point."""
    scale = axes.figure.dpi / 72
    places = [axes.transData.transform((x, y)) for x, y, _ in points]
    middle = (axes.bbox.x0 + axes.bbox.x1) / 2
    widths = [len(name) * LABEL_SIZE * 0.55 * scale for _, _, name in points]
    boxes = [
        (place[0] + LABEL_OFFSET * scale, place[0] + LABEL_OFFSET * scale + width)
        if place[0] < middle
        else (place[0] - LABEL_OFFSET * scale - width, place[0] - LABEL_OFFSET * scale)
        for place, width in zip(places, widths, strict=True)
    ]
    heights = spread_apart([place[1] for place in places], boxes, LABEL_SIZE * 1.25 * scale)
    for (x, y, name), place, height in zip(points, places, heights, strict=True):
        is_left = place[0] < middle
        axes.annotate(
            name, (x, y), xytext=(LABEL_OFFSET if is_left else -LABEL_OFFSET, (height - place[1]) / scale),
            textcoords="offset points", fontsize=LABEL_SIZE, va="center", ha="left" if is_left else "right",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def spread_apart(heights: Sequence[float], boxes: Sequence[tuple[float, float]], gap: float) -> list[float]:
    """Return heights at which labels that share horizontal places are at least `gap` apart, near those they had.

    Args:
        heights: The heights wanted.
        boxes: Each label's left and right end.
        gap: The least distance between the heights of two labels whose boxes overlap.
    """
    found = list(heights)
    order = sorted(range(len(found)), key=lambda index: found[index])
    for _ in range(200):
        moved = False
        for place, low in enumerate(order):
            for high in order[place + 1 :]:
                overlap = boxes[low][0] < boxes[high][1] and boxes[high][0] < boxes[low][1]
                lack = gap - (found[high] - found[low])
                if overlap and lack > 1e-6 * gap:
                    found[low] -= lack / 2
                    found[high] += lack / 2
                    moved = True
        if not moved:
            break
    return found
