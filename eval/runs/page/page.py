"""Writing of the page: one HTML file that needs no other file, and its figures as PNGs beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from conf.schema import ReportConfig
from eval.runs.page.curves import Curve, curves, final_layers
from eval.runs.page.draw import PAIR_COLORS, Picture, draw_curves, draw_layers
from eval.runs.page.law import FittedLaw, fit_runs
from eval.runs.page.panels import PANELS, SECTIONS, Panel
from eval.runs.run import Run
from sparsity.common.text import half_up
from train.record.siblings import finite
from train.record.table import COLUMNS, cells

HERE = Path(__file__).parent
SIGNIFICANT_DIGITS = 6


def write_page(config: ReportConfig, runs: Sequence[Run], page: Path) -> None:
    """Draw every panel of PANELS for which the runs have data, and write the page and its PNGs."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    law, why = fit_runs(runs, config.loss, config.form)
    figures: dict[str, list[dict[str, Any]]] = {panel.name: [] for panel in PANELS}
    data: dict[str, Any] = {}
    for panel in PANELS:
        if panel.kind == "layers":
            figures[panel.name] = layer_figures(panel, runs, folder)
            continue
        is_law = panel.name == "loss_avg_params"
        panel = with_loss(panel, config.loss) if is_law else panel
        drawn = curves(panel, runs)
        if not drawn:
            continue
        picture = draw_curves(panel, runs, drawn, folder / f"{panel.name}.png", law if is_law else None)
        note = " ".join(part for part in (panel.note, law_words(law, why) if is_law else "") if part)
        figures[panel.name] = [figure_of(panel, picture, described(panel, runs, drawn), note)]
        if picture.scale:
            data[panel.name] = readable(panel, picture, drawn)
    template = Environment(autoescape=True).from_string((HERE / "page.html").read_text(encoding="utf-8"))
    colors = [{"name": run.name, "color": run.pair % len(PAIR_COLORS)} for run in runs]
    html = template.render(
        title=config.title or common_folder(runs),
        subtitle=counted(runs),
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        data=Markup(script_json({"runs": colors, "panels": data})),
        runs=[row(number, run) for number, run in enumerate(runs)],
        columns=COLUMNS.values(),
        sections=[section(name, figures) for name in SECTIONS],
        command=shlex.join(["python", "-m", "eval.report", f"runs={','.join(config.runs)}"]),
        folder=f"{folder.name}/",
    )
    page.write_text(html, encoding="utf-8")


def section(name: str, figures: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a section's figures, and its panels without any, for the page's template."""
    own = [panel for panel in PANELS if panel.section == name]
    return {
        "name": name,
        "figures": [figure for panel in own for figure in figures[panel.name]],
        "absent": [panel for panel in own if not figures[panel.name]],
    }


def layer_figures(panel: Panel, runs: Sequence[Run], folder: Path) -> list[dict[str, Any]]:
    """Return a figure for each run that has recorded its layers."""
    found = []
    for number, run in enumerate(runs):
        layers = final_layers(panel, run)
        if not layers:
            continue
        own = replace(panel, title=f"{panel.title}: {run.name}")
        picture = draw_layers(panel, run, number, layers, folder / f"{panel.name}-{number}.png")
        least, most = min(layers, key=lambda name: layers[name]), max(layers, key=lambda name: layers[name])
        note = (
            f"From {half_up(layers[least], 3)} in {least} to {half_up(layers[most], 3)} in {most}"
            f"{'' if run.is_finished else ', so far'}."
        )
        found.append(
            {**figure_of(own, picture, f"{own.title}. {note}", note), "name": f"{panel.name}-{number}", "run": number}
        )
    return found


def figure_of(panel: Panel, picture: Picture, description: str, note: str) -> dict[str, Any]:
    """Return a panel's figure for the page's template."""
    return {
        "name": panel.name,
        "title": panel.title,
        "svg": Markup(picture.svg),
        "scale": picture.scale,
        "description": description,
        "note": note,
        "run": None,
    }


def with_loss(panel: Panel, loss: str) -> Panel:
    """Return a panel that shows the loss named `loss`."""
    words = {"heldout_loss": "held-out loss", "final_train_loss": "final training loss"}
    return replace(panel, y=loss, y_label=f"{words[loss]} (nats per token)")


def law_words(law: FittedLaw | None, why: str) -> str:
    """Return the sentences about the law; `why` says what is missing."""
    more = "Intervals and held-out errors: python -m eval.scaling_law." if law else ""
    return " ".join(part for part in (law.words if law else "", why, more) if part)


def described(panel: Panel, runs: Sequence[Run], drawn: Sequence[Curve]) -> str:
    """Return a description of the figure for those who cannot see it: the last value of each run."""
    ends = "; ".join(
        f"{runs[curve.run].name} {'ends at ' if panel.of_records else ''}{curve.y[-1]:.4g}" for curve in drawn
    )
    return f"{panel.title}, {panel.y_label}: {ends}."


def readable(panel: Panel, picture: Picture, drawn: Sequence[Curve]) -> dict[str, Any]:
    """Return the data from which the page's script shows the values under the pointer."""
    return {
        **(picture.scale or {}),
        "unit": panel.x_label,
        "single": panel.kind == "points",
        "curves": [{"run": curve.run, "x": rounded(curve.x), "y": rounded(curve.y)} for curve in drawn],
    }


def rounded(values: Sequence[float]) -> list[float]:
    """Round values to the digits that a page shows."""
    short = [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in values]
    return [int(value) if value.is_integer() else value for value in short]


def row(number: int, run: Run) -> dict[str, Any]:
    """Return a run as the template needs it; if its config or figures cannot be read, its cells are empty."""
    empty = dict.fromkeys(COLUMNS, "")
    try:
        line = cells(finite(run.figures))
    except (KeyError, TypeError, ValueError):
        line = empty
    return {
        "number": number,
        "name": run.name,
        "color": run.pair % len(PAIR_COLORS),
        "is_sparse": run.is_sparse,
        "is_finished": run.is_finished,
        "state": run.state,
        "choices": ", ".join(choices_of(run)),
        "cells": [line[column] for column in COLUMNS if column != "model"],
        "sample": run.sample,
    }


def choices_of(run: Run) -> list[str]:
    """Return the choices that a run states, and where it branched from another run."""
    choices, branch = run.figures.get("choices"), run.figures.get("branch")
    words = list(map(str, choices)) if isinstance(choices, list) else []
    if isinstance(branch, Mapping):
        words.insert(0, f"branched from {branch.get('run')} at step {branch.get('step')}")
    return words


def counted(runs: Sequence[Run]) -> str:
    """Return the number of runs of each kind in words."""
    sparse, finished = sum(run.is_sparse for run in runs), sum(run.is_finished for run in runs)
    kinds = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}: {sparse} sparse (solid), {len(runs) - sparse} dense (dashed)"
    unfinished = "" if finished == len(runs) else f", {len(runs) - finished} not finished"
    return f"{kinds}{unfinished}. A sparse run and its dense twin share a colour."


def common_folder(runs: Sequence[Run]) -> str:
    """Return the folder that holds all the runs, or the one run's own name."""
    if len(runs) == 1:
        return runs[0].name
    parents = {run.folder.parent for run in runs}
    return parents.pop().name if len(parents) == 1 else f"{len(runs)} runs"


def script_json(value: Any) -> str:
    """Return JSON that is safe inside a script element, whatever the runs are called."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
