"""Drawing of a panel: an SVG whose colours the page sets, and a PNG that is complete by itself."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.runs.page.curves import Curve, layer_rows
from eval.runs.page.law import FittedLaw
from eval.runs.page.panels import Panel
from eval.runs.run import Run
from sparsity.common.text import half_up
from train.record.read import is_number
from train.record.style import count_ticks, lighten, pyplot

PAIR_COLORS = ("#1f5fa8", "#d1690e", "#1a7f5a", "#a83279", "#6b4fbb", "#8a6d00", "#0e8199", "#b3261e")
"""The colours of pairs of runs; for dark mode the page has a lighter set of the same hues."""
DENSE_DASH = (0, (4, 2))
INK, RULE, PAPER, FAINT = "#1c1c1c", "#dadada", "#fdfdfd", "#777777"
WIDTH, HEIGHT, DPI = 6.4, 3.4, 72
PNG_DPI = 150
MAX_NUMBERED_COLUMNS = 24
"""The most layers whose cells have room for a density as text."""
DARK_FROM = 0.55
"""The density from which a cell is so dark that its number is written in white."""


@dataclass(frozen=True)
class Picture:
    """An SVG for a page, with the data to read values from it: the box of the axes in the SVG's units, limits, scales."""

    svg: str
    scale: Mapping[str, Any] | None = None


def color(run: Run) -> str:
    return PAIR_COLORS[run.pair % len(PAIR_COLORS)]


def draw_curves(
    panel: Panel, runs: Sequence[Run], drawn: Sequence[Curve], png: Path, law: FittedLaw | None = None
) -> Picture:
    """Draw the lines, stairs, points or bars of all runs that have any."""
    rows = len(drawn) if panel.kind == "bars" else 0
    with new_figure(max(HEIGHT, 0.9 + 0.32 * rows)) as (figure, axes):
        if panel.kind == "bars":
            _bars(axes, panel, runs, drawn)
        else:
            _curves(axes, panel, runs, drawn, law)
        svg = svg_of(figure, panel.name)
        picture = Picture(svg, None if panel.kind == "bars" else _scale(figure, axes, panel))
        if panel.kind != "bars":
            _legend(figure, panel, runs, drawn)
        axes.set_title(panel.title, loc="left", fontweight="bold")
        save_png(figure, png)
    return picture


def draw_layers(panel: Panel, run: Run, number: int, layers: Mapping[str, float], png: Path) -> Picture:
    """Draw one run's densities as cells: a row for each kind of weight and a column for each layer; then other weights."""
    inside, outside = layer_rows(layers)
    columns = sorted({layer for row in inside.values() for layer in row}) or [0]
    cells = [
        (place, columns.index(layer), 1, value)
        for place, row in enumerate(inside.values())
        for layer, value in row.items()
    ]
    cells += [(len(inside) + place, 0, len(columns), value) for place, value in enumerate(outside.values())]
    names = [*inside, *outside]
    with new_figure(1.0 + 0.26 * len(names)) as (figure, axes):
        for row, column, span, value in cells:
            axes.barh(row, span, left=column, height=1, color=_shade(value), edgecolor=PAPER, linewidth=1)
            if len(columns) <= MAX_NUMBERED_COLUMNS:
                ink = "#101010" if value < DARK_FROM else "#f6f6f6"
                axes.text(column + span / 2, row, half_up(value, 2), ha="center", va="center", fontsize=7.5, color=ink)
        axes.set(xlim=(0, len(columns)), ylim=(len(names) - 0.5, -0.5), xlabel="layer")
        axes.set_yticks(range(len(names)), names)
        step = max(1, len(columns) // MAX_NUMBERED_COLUMNS)
        axes.set_xticks([place + 0.5 for place in range(0, len(columns), step)], columns[::step])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        svg = svg_of(figure, f"{panel.name}-{number}")
        axes.set_title(f"{panel.title}: {run.name}", loc="left", fontweight="bold")
        save_png(figure, png)
    return Picture(svg)


def _shade(density: float) -> Any:
    from matplotlib import colormaps

    return colormaps["YlGnBu"](density)


@contextmanager
def new_figure(height: float) -> Iterator[Any]:
    """Yield (figure, axes) in the project's style, and close the figure at the end."""
    plt = pyplot()
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "sparsellm", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": RULE, "axes.unicode_minus": False,
    }  # fmt: skip
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        lighten(axes)
        axes.grid(alpha=1.0, linewidth=0.6)
        axes.set_axisbelow(True)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _curves(axes: Any, panel: Panel, runs: Sequence[Run], drawn: Sequence[Curve], law: FittedLaw | None) -> None:
    for curve in drawn:
        run = runs[curve.run]
        own = {"color": color(run), "gid": f"run-{curve.run}", "zorder": 3}
        if panel.kind == "points" or len(curve.x) == 1:
            hollow = {"markerfacecolor": PAPER} if not run.is_sparse else {}
            marker = "D" if run.is_sparse else "o"
            axes.plot(curve.x, curve.y, marker, markersize=7, markeredgewidth=1.6, **hollow, **own)
        else:
            style = {"linewidth": 1.6, "linestyle": "-" if run.is_sparse else DENSE_DASH}
            draw_style = "steps-pre" if panel.kind == "stairs" else "default"
            axes.plot(curve.x, curve.y, drawstyle=draw_style, **style, **own)
    if law:
        _law(axes, law, drawn)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.log_x:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.dense_y is not None:
        axes.set_ylim(0, 1.05 * panel.dense_y)
    count_ticks(axes.xaxis)


def _law(axes: Any, law: FittedLaw, drawn: Sequence[Curve]) -> None:
    """Draw the law's curves, cut at the range of the runs' losses; a steep law would otherwise flatten the figure."""
    low, high = min(min(curve.y) for curve in drawn), max(max(curve.y) for curve in drawn)
    room = 0.12 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    for label, sizes, losses in law.curves():
        axes.plot(sizes, losses, color=FAINT, linewidth=1.2, zorder=2)
        inside = [
            (size, loss)
            for size, loss in zip(sizes, losses, strict=True)
            if abs(loss - (low + high) / 2) < room + (high - low) / 2
        ]
        if inside:
            axes.annotate(label, inside[-1], xytext=(0, 4), textcoords="offset points", color=FAINT, ha="right")


def _bars(axes: Any, panel: Panel, runs: Sequence[Run], drawn: Sequence[Curve]) -> None:
    """Draw a bar for each run, its value after the bar, and a tick at the value of a unigram model of the same tokens."""
    for place, curve in enumerate(drawn):
        run, value = runs[curve.run], curve.y[0]
        gid = f"run-{curve.run}"
        fill = (
            {"color": color(run)} if run.is_sparse else {"facecolor": PAPER, "edgecolor": color(run), "linewidth": 1.6}
        )
        axes.barh(place, value, height=0.62, **fill)[0].set_gid(gid)
        axes.annotate(
            half_up(value, 3), (value, place), xytext=(4, 0), textcoords="offset points", va="center", gid=gid
        )
        unigram = run.figures.get(f"unigram_{panel.y}")
        if is_number(unigram):
            axes.plot([unigram, unigram], [place - 0.36, place + 0.36], color=FAINT, linewidth=2, gid=gid)
    axes.set_yticks(range(len(drawn)), [runs[curve.run].name for curve in drawn])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{panel.y_label} (tick: a unigram model of the same tokens)")


def _legend(figure: Any, panel: Panel, runs: Sequence[Run], drawn: Sequence[Curve]) -> None:
    """Draw a legend in the PNG only, because the page has one legend for all its figures."""
    handles = [_line_or_mark(panel, runs[curve.run]) for curve in drawn]
    labels = [runs[curve.run].name for curve in drawn]
    if handles:
        columns = 1 if max(map(len, labels)) > 40 else 3
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)


def _line_or_mark(panel: Panel, run: Run) -> Any:
    from matplotlib.lines import Line2D

    if panel.kind != "points":
        return Line2D([], [], color=color(run), linestyle="-" if run.is_sparse else DENSE_DASH)
    face = color(run) if run.is_sparse else PAPER
    return Line2D([], [], color=color(run), marker="D" if run.is_sparse else "o", markerfacecolor=face, linestyle="")


def svg_of(figure: Any, name: str) -> str:
    """Return the figure as an SVG element: text as text, colours as the page's variables, groups run-N as data-run."""
    figure.draw_without_rendering()
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r' id="run-(\d+)"', r' data-run="\1"', svg)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)
    # Marks and clip paths are named by their contents, so two figures of a page may define the same name.
    svg = re.sub(r'( id="|href="#|url\(#)(?=[mp][0-9a-f]{10})', rf"\g<1>{name}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    for role, variable in {INK: "ink", RULE: "rule", PAPER: "paper", FAINT: "faint"}.items():
        svg = svg.replace(role, f"var(--{variable})")
    for number, pair in enumerate(PAIR_COLORS):
        svg = svg.replace(pair, f"var(--pair-{number})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _scale(figure: Any, axes: Any, panel: Panel) -> dict[str, Any]:
    """Return the box of the axes in the SVG's units, which are points from the upper left, and the axes' limits."""
    box = axes.get_position()
    width, height = figure.get_size_inches() * 72
    return {
        "box": [
            round(edge, 2) for edge in (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
        ],
        "x": list(axes.get_xlim()),
        "y": list(axes.get_ylim()),
        "log": [panel.log_x, panel.log_y],
    }


def save_png(figure: Any, png: Path) -> None:
    figure.savefig(png, dpi=PNG_DPI, facecolor="white")
