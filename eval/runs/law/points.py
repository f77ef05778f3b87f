"""The points that the law is fitted to: size, tokens and loss of finished runs, or from the lines of a CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.runs.figures import check_comparable, finished_runs, number_of, positive
from eval.runs.law.identifiable import levels
from eval.runs.law.lbfgs import Array

COLUMNS = {
    "avg_linear_params": ("avg_linear_params",),
    "final_linear_params": ("nonzero_linear_params", "final_linear_params", "nonzero_linear"),
    "total_tokens": ("total_tokens",),
}
"""Each figure's names in summaries, in CSV files, and in the table of the published series."""
NAMES = ("run_name", "name", "model")
LOSSES = ("loss", "heldout_loss", "final_train_loss")
"""The losses that loss=auto tries, in this order; it takes the first that every point has."""


@dataclass(frozen=True)
class Point:
    """One finished run: its linear parameters on average and at the end, its tokens, and its loss in nats per token."""

    name: str
    avg_linear_params: float
    final_linear_params: float
    total_tokens: float
    loss: float
    sparsity: float
    trunk: str = ""
    """The run that this one branched from, whose steps it shares; empty for other runs and for lines of a CSV file."""


@dataclass(frozen=True)
class Points:
    """Runs that can be compared, and the name of the loss that was read from all of them."""

    points: tuple[Point, ...]
    loss_name: str

    def column(self, name: str) -> Array:
        """Return one attribute of every point, [points]."""
        return np.array([getattr(point, name) for point in self.points], dtype=float)

    @property
    def percents(self) -> NDArray[np.intp]:
        """The sparsity of each point in whole per cent; 0 for a dense run."""
        return np.round(100 * self.column("sparsity")).astype(np.intp)

    @property
    def configurations(self) -> NDArray[np.intp]:
        """The number of each point's configuration, from 0: runs that differ only in their seed have the same."""
        columns = ("avg_linear_params", "final_linear_params", "total_tokens")
        keys = np.stack([*(levels(self.column(name)) for name in columns), self.percents])
        return np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)

    @property
    def trunks(self) -> NDArray[np.intp]:
        """The number of each point's trunk, from 0: a run and the runs that branched from it have the same."""
        numbers: dict[object, int] = {}
        keys = [point.trunk or number for number, point in enumerate(self.points)]
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)


def read_points(runs: Sequence[str], loss: str = "auto") -> Points:
    """Read the points of finished runs and CSV files; a run that is named twice counts once.

    Args:
        runs: Run folders, folders of runs, patterns of them, and CSV files.
        loss: The name of the loss to read, or `auto`.

    Raises:
        ValueError: A name matches no finished run, a figure is missing, or the losses cannot be compared.
    """
    rows = finished_runs(runs)
    loss_name = _choose_loss(rows, loss)
    check_comparable(rows)
    return Points(tuple(_point(where, row, loss_name) for where, row in rows.items()), loss_name)


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


def _point(where: str, row: Mapping[str, Any], loss_name: str) -> Point:
    figures = {}
    for figure, names in COLUMNS.items():
        present = [name for name in names if name in row]
        if not present:
            raise ValueError(f"{where} has no figure {figure}: give a column {' or '.join(names)}.")
        figures[figure] = positive(where, row, present[0])
    final, average = figures["final_linear_params"], figures["avg_linear_params"]
    if "sparsity" in row:
        sparsity = number_of(where, "sparsity", row["sparsity"])
    elif "linear_params" in row:
        sparsity = 1 - final / positive(where, row, "linear_params")
    elif final == average:
        sparsity = 0.0
    else:
        raise ValueError(f"{where} is sparse, but nothing says how sparse: give a column sparsity or linear_params.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{where} has sparsity={sparsity:g}, outside [0, 1): give the share of weights removed.")
    name = next((str(row[key]) for key in NAMES if key in row), where)
    loss = positive(where, row, loss_name)
    return Point(name, loss=loss, sparsity=sparsity, trunk=_trunk(where, row), **figures)


def _trunk(where: str, row: Mapping[str, Any]) -> str:
    """Return the folder of the run that a point's run descends from by branching; its own if it did not branch."""
    branch = row.get("branch")
    if isinstance(branch, Mapping):
        return str(branch.get("trunk", ""))
    return str(Path(where).parent) if where.endswith("summary.json") else ""
