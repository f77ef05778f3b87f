"""The numbers that a panel shows for each run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.runs.page.panels import Panel
from eval.runs.run import Run
from train.record.read import is_number

MAX_POINTS = 400
"""The most points of a curve. Of a longer one, the extremes of equal stretches are drawn, so that no spike is lost."""
MAX_POINTS_OF_ALL = 6000
MIN_POINTS = 60


@dataclass(frozen=True)
class Curve:
    """The points of one run in one panel; `run` is the run's index."""

    run: int
    x: tuple[float, ...]
    y: tuple[float, ...]


def curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """Return the curves of the runs that have any; in panels of points and bars, each is a single point."""
    most = max(MIN_POINTS, min(MAX_POINTS, MAX_POINTS_OF_ALL // max(1, len(runs))))
    found = []
    for number, run in enumerate(runs):
        points = record_points(panel, run) if panel.of_records else summary_point(panel, run)
        if points:
            x, y = zip(*(thinned(points, most)), strict=True)
            found.append(Curve(number, x, y))
    return found


def record_points(panel: Panel, run: Run) -> list[tuple[float, float]]:
    points = [
        (float(record[panel.x]), float(record[panel.y]))
        for record in run.records
        if is_number(record.get(panel.x)) and is_number(record.get(panel.y))
    ]
    if points or panel.dense_y is None or run.is_sparse:
        return points
    seen = [float(record[panel.x]) for record in run.records if panel.x in record]
    return [(place, panel.dense_y) for place in (min(seen), max(seen))] if seen else []


def summary_point(panel: Panel, run: Run) -> list[tuple[float, float]]:
    """Return a run's point (x, y) from its summary's figures; a bar's x is 0."""
    x, y = (0.0 if panel.kind == "bars" else run.figures.get(panel.x)), run.figures.get(panel.y)
    return [(float(x), float(y))] if is_number(x) and is_number(y) else []


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` of the points, in order: the first, the last, and the extremes of equal stretches."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, (most - 2) // 2)
    kept = {0, len(points) - 1}
    for stretch in range(stretches):
        inside = range(stretch * len(points) // stretches, (stretch + 1) * len(points) // stretches)
        kept |= {min(inside, key=lambda index: points[index][1]), max(inside, key=lambda index: points[index][1])}
    return [points[index] for index in sorted(kept)]


def final_layers(panel: Panel, run: Run) -> dict[str, float]:
    """Return the last values of the keys of the panel's group, by key without the group's name.

    A record has all keys of a group or none.
    """
    group = panel.y.removesuffix("*")
    for record in reversed(run.records):
        values = {
            key.removeprefix(group): value
            for key, value in record.items()
            if key.startswith(group) and is_number(value)
        }
        if values:
            return values
    return {}


def layer_rows(layers: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Return densities in the model's order: those in layers by kind of weight and layer number, then the others by name."""
    inside: dict[str, dict[int, float]] = {}
    outside: dict[str, float] = {}
    for name, value in layers.items():
        name = name.removesuffix(".weight")
        found = re.fullmatch(r".*?\.(\d+)\.(?:.*\.)?([^.]+)", name)
        if found:
            inside.setdefault(found[2], {})[int(found[1])] = value
        else:
            outside[name] = value
    return inside, outside
