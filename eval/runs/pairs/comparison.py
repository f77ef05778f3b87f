"""Comparison of each sparse run with its dense twin, and with the curve of all dense runs at exactly its average size.

A twin's width is a whole number, so the twin is slightly larger or smaller than N-bar, the sparse run's average size. The
curve removes this difference: between neighbouring dense runs, log loss is taken as linear in log N. The paper's claim
(arXiv 2501.12486) is that both gaps are 0.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.runs.figures import check_comparable, finished_runs, positive
from train.record.directory import run_identity
from train.record.read import CONFIG, read_config
from train.record.siblings import has_sparse_weights

SEEDS = ("trainer.seed", "trainer.data_seed")
NAMES = ("run_name", "sweep_name")
TWIN = "model.match"


@dataclass(frozen=True)
class Trial:
    """One finished run: its settings by dotted key, without seeds and names, and its figures; loss in nats per token."""

    settings: Mapping[str, Any]
    seed: int
    is_sparse: bool
    avg_linear_params: float
    final_linear_params: float
    total_tokens: float
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; with one seed the deviation is None."""

    mean: float
    std: float | None
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Comparison:
    """The comparison of one sparse configuration.

    Gaps are sparse loss minus dense loss, in nats per token: above 0, the sparse run is worse.
    """

    settings: Mapping[str, Any]
    """The settings that differ among the sparse configurations."""
    avg_linear_params: float
    final_linear_params: float
    loss: Spread
    bits_per_byte: Spread
    twin_linear_params: float | None
    twin_loss: Spread | None
    twin_gap: Spread | None
    """The gap to the twin, seed by seed, over the seeds that both have."""
    curve_loss: float | None
    """The loss of the dense curve at `avg_linear_params`; None outside the range of the dense runs."""

    @property
    def curve_gap(self) -> float | None:
        return None if self.curve_loss is None else self.loss.mean - self.curve_loss


def read_trials(patterns: Sequence[str]) -> list[Trial]:
    """Read the finished runs that `patterns` name.

    Raises:
        ValueError: A run has no config.yaml, or the losses cannot be compared.
    """
    rows = finished_runs(patterns)
    check_comparable(rows)
    return [_trial(Path(where), row) for where, row in rows.items()]


def compare(runs: Sequence[Trial]) -> list[Comparison]:
    """Return a comparison for each sparse configuration, the largest average size first.

    Raises:
        ValueError: All runs are sparse, or all are dense.
    """
    groups: dict[str, list[Trial]] = {}
    for run in runs:
        groups.setdefault(_key(run.settings), []).append(run)
    sparse = [group for group in groups.values() if group[0].is_sparse]
    if not sparse or len(sparse) == len(groups):
        raise ValueError(
            f"the runs are all {'sparse' if sparse else 'dense'}: give sparse runs and dense ones of the same data, such as "
            "those of sweep=twin_pairs."
        )
    names = _differing([group[0].settings for group in sparse])
    found = []
    for group in sparse:
        twins = groups.get(_key({**group[0].settings, TWIN: "average"}), [])
        found.append(_comparison(group, twins, _rivals(group[0], runs), names))
    return sorted(found, key=lambda comparison: -comparison.avg_linear_params)


def curve(dense: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """Return the dense runs' sizes in linear parameters, sorted, and the mean loss at each."""
    sizes = sorted({run.avg_linear_params for run in dense})
    return sizes, [statistics.fmean(run.loss for run in dense if run.avg_linear_params == size) for size in sizes]


def curve_loss(dense: Sequence[Trial], size: float) -> float | None:
    """Return the dense curve's loss at `size` linear parameters, interpolated log-log; None outside the dense runs' range."""
    sizes, losses = curve(dense)
    if len(sizes) < 2 or not sizes[0] <= size <= sizes[-1]:
        return None
    return math.exp(float(np.interp(math.log(size), np.log(sizes), np.log(losses))))


def _comparison(
    group: Sequence[Trial], twins: Sequence[Trial], dense: Sequence[Trial], names: Sequence[str]
) -> Comparison:
    average = statistics.fmean(run.avg_linear_params for run in group)
    twin_losses = {run.seed: run.loss for run in twins}
    gaps = [run.loss - twin_losses[run.seed] for run in group if run.seed in twin_losses]
    return Comparison(
        settings={name: group[0].settings.get(name) for name in names},
        avg_linear_params=average,
        final_linear_params=group[0].final_linear_params,
        loss=Spread.of([run.loss for run in group]),
        bits_per_byte=Spread.of([run.bits_per_byte for run in group]),
        twin_linear_params=twins[0].avg_linear_params if twins else None,
        twin_loss=Spread.of(list(twin_losses.values())) if twins else None,
        twin_gap=Spread.of(gaps) if gaps else None,
        curve_loss=curve_loss(dense, average),
    )


def _rivals(sparse: Trial, runs: Sequence[Trial]) -> list[Trial]:
    """Return the dense runs with the same recipe: they differ from `sparse` only in model and sparsity."""

    def recipe(run: Trial) -> str:
        return _key(
            {key: value for key, value in run.settings.items() if key.split(".")[0] not in ("sparsity", "model")}
        )

    return [run for run in runs if not run.is_sparse and recipe(run) == recipe(sparse)]


def _trial(summary_file: Path, row: Mapping[str, Any]) -> Trial:
    config_file = summary_file.with_name(CONFIG)
    if not config_file.exists():
        raise ValueError(
            f"{summary_file} has no config.yaml beside it: give run folders, whose settings can be compared."
        )
    settings, where = _settings(config_file), str(summary_file)
    return Trial(
        settings={key: value for key, value in settings.items() if key not in (*SEEDS, *NAMES)},
        seed=settings["trainer.seed"],
        is_sparse=has_sparse_weights(row),
        avg_linear_params=positive(where, row, "avg_linear_params"),
        final_linear_params=positive(where, row, "nonzero_linear_params"),
        total_tokens=positive(where, row, "total_tokens"),
        loss=positive(where, row, "heldout_loss"),
        bits_per_byte=positive(where, row, "bits_per_byte"),
    )


def _settings(config_file: Path) -> dict[str, Any]:
    """Return a run's settings by dotted key.

    Raises:
        ValueError: The file is garbled or was written by another version.
    """
    try:
        settings = dict(_flat(run_identity(read_config(config_file))))
        json.dumps([settings[SEEDS[0]], settings], allow_nan=False)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{config_file} is garbled or of another version: leave this run out.") from None
    return settings


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys and the values of nested dicts."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)
