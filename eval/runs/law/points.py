"""The points that the law is fitted to: what finished runs, or the lines of a CSV file, say of size, tokens and loss."""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.runs.folders import named_places, run_folders
from eval.runs.law.identifiable import levels
from eval.runs.law.lbfgs import Array

COLUMNS = {
    "avg_linear_params": ("avg_linear_params",),
    "final_linear_params": ("nonzero_linear_params", "final_linear_params", "nonzero_linear"),
    "total_tokens": ("total_tokens",),
}
"""Names of a figure in summaries, in CSV files, and in the series' table."""
NAMES = ("run_name", "name", "model")
LOSSES = ("loss", "heldout_loss", "final_train_loss")
"""What loss=auto takes: the first that every point has."""
UNITS = {"K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "%": 0.01}
SAME_TOKENIZER = 0.03
"""Relative difference of held-out tokens per byte that windows of another length explain; tokenizers differ by more."""


@dataclass(frozen=True)
class Point:
    """One finished run. Linear parameters: their average over the run, and those left in the end; loss in nats a token."""

    name: str
    avg_linear_params: float
    final_linear_params: float
    total_tokens: float
    loss: float
    sparsity: float
    trunk: str = ""
    """The run whose steps this one shares; empty for a run of its own, and for a line of a CSV file."""


@dataclass(frozen=True)
class Points:
    """Runs that can be compared, and the name of the loss that was read of all of them."""

    points: tuple[Point, ...]
    loss_name: str

    def column(self, name: str) -> Array:
        return np.array([getattr(point, name) for point in self.points], dtype=float)

    @property
    def percents(self) -> NDArray[np.intp]:
        """Sparsity in whole per cent; 0 is a dense run."""
        return np.round(100 * self.column("sparsity")).astype(np.intp)

    @property
    def configurations(self) -> NDArray[np.intp]:
        """A number for each point, from 0 up, the same for runs that differ in nothing but their seed."""
        columns = ("avg_linear_params", "final_linear_params", "total_tokens")
        keys = np.stack([*(levels(self.column(name)) for name in columns), self.percents])
        return np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)

    @property
    def trunks(self) -> NDArray[np.intp]:
        """A number for each point, from 0 up, the same for runs that share a trunk: branches of one run, and that run."""
        numbers: dict[object, int] = {}
        keys = [point.trunk or number for number, point in enumerate(self.points)]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)


def read_points(runs: Sequence[str], loss: str = "auto") -> Points:
    """The points of run folders, folders of runs, patterns of them and CSV files; a run named twice counts once."""
    rows = finished_runs(runs)
    loss_name = _choose_loss(rows, loss)
    check_comparable(rows)
    return Points(tuple(_point(where, row, loss_name) for where, row in rows.items()), loss_name)


def finished_runs(runs: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The figures of every finished run that the patterns name, by where they were read; a run named twice counts once."""
    rows: dict[str, Mapping[str, Any]] = {}
    for pattern in runs:
        found = dict(_rows(pattern))
        if not found:
            raise ValueError(f"runs={pattern} holds no finished run: name folders with a summary.json, or a CSV file.")
        rows |= found
    return rows


def _rows(pattern: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it was read, figures) of every finished run that a pattern names; unfinished runs are passed over."""
    for place in named_places(pattern):
        if place.is_file() and place.suffix == ".csv":
            yield from _csv_rows(place)
        elif place.is_dir():
            for folder in run_folders(place, "summary.json"):
                yield str((folder / "summary.json").resolve()), _summary(folder / "summary.json")
        elif place.name == "summary.json":
            yield str(place.resolve()), _summary(place)
        elif not glob.has_magic(pattern):
            raise ValueError(
                f"runs={pattern} is no run: give a folder with a summary.json, or a file that ends in .csv."
            )


def _csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.DictReader(lines, skipinitialspace=True), start=2):
            yield f"{file} line {number}", {key: value for key, value in row.items() if key and value not in (None, "")}


def _summary(file: Path) -> Mapping[str, Any]:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}): finish the run again, or leave it out.") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{file} is no run's summary: leave it out.")
    return {"run_name": file.parent.name, **{key: value for key, value in summary.items() if value is not None}}


def _choose_loss(rows: Mapping[str, Mapping[str, Any]], asked: str) -> str:
    for name in LOSSES if asked == "auto" else (asked,):
        without = [where for where, row in rows.items() if name not in row]
        if not without:
            return name
    if asked == "auto":
        raise ValueError(
            f"the runs have none of {', '.join(LOSSES)} in common: name the column of the loss with loss=."
        )
    raise ValueError(f"{without[0]} has no figure {asked}: name another with loss=, or leave the run out.")


def check_comparable(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Losses a token compare only between runs of one text and one tokenizer."""
    data = sorted({str(row["data"]) for row in rows.values() if "data" in row})
    if len(data) > 1:
        raise ValueError(
            f"the runs are trained on {' and '.join(data)}, whose losses do not compare: give those of one."
        )
    fertile = {
        row["heldout_tokens"] / row["heldout_bytes"]: where
        for where, row in rows.items()
        if isinstance(row.get("heldout_tokens"), int) and isinstance(row.get("heldout_bytes"), int)
        if row["heldout_tokens"] > 0 and row["heldout_bytes"] > 0
    }
    if fertile and max(fertile) > (1 + SAME_TOKENIZER) * min(fertile):
        raise ValueError(
            f"{fertile[min(fertile)]} and {fertile[max(fertile)]} cut their held-out text into {min(fertile):.3f} and "
            f"{max(fertile):.3f} tokens a byte, so that their losses do not compare: give runs of one tokenizer."
        )


def _point(where: str, row: Mapping[str, Any], loss_name: str) -> Point:
    figures = {}
    for figure, names in COLUMNS.items():
        present = [name for name in names if name in row]
        if not present:
            raise ValueError(f"{where} has no figure {figure}: give a column {' or '.join(names)}.")
        figures[figure] = positive(where, row, present[0])
    final, average = figures["final_linear_params"], figures["avg_linear_params"]
    if "sparsity" in row:
        sparsity = _number(where, "sparsity", row["sparsity"])
    elif "linear_params" in row:
        sparsity = 1 - final / positive(where, row, "linear_params")
    elif final == average:
        sparsity = 0.0
    else:
        raise ValueError(f"{where} is sparse, and nothing says how much: give a column sparsity or linear_params.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{where} has sparsity={sparsity:g}, outside [0, 1): give the share of weights removed.")
    name = next((str(row[key]) for key in NAMES if key in row), where)
    loss = positive(where, row, loss_name)
    return Point(name, loss=loss, sparsity=sparsity, trunk=_trunk(where, row), **figures)


def _trunk(where: str, row: Mapping[str, Any]) -> str:
    """Return the folder of the run that a point's run branched from in the end, or its own."""
    branch = row.get("branch")
    if isinstance(branch, Mapping):
        return str(branch.get("trunk", ""))
    return str(Path(where).parent) if where.endswith("summary.json") else ""


def _number(where: str, key: str, value: Any) -> float:
    """A number, also as tables write it: 1.02B, 89.6 M, 20.00%."""
    text = str(value).strip()
    unit = UNITS.get(text[-1:], 1.0)
    try:
        return float(text.rstrip("".join(UNITS)).replace(",", "").replace("_", "")) * unit
    except ValueError:
        raise ValueError(f"{where} has {key}={text}, which is no number: write 1234, 1.2e3 or 1.2K.") from None


def positive(where: str, row: Mapping[str, Any], key: str) -> float:
    """The figure `key` of a run, finite and above 0; a ValueError names the run that has another or none."""
    if key not in row:
        raise ValueError(f"{where} has no figure {key}: leave this run out.")
    number = _number(where, key, row[key])
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{where} has {key}={number:g}, which is no finite number above 0: leave this run out.")
    return number
