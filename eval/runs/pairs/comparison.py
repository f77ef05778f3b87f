"""Comparison of each sparse run with its dense twin, and with the curve of all dense runs at exactly its average size.

A twin's width is a whole number, so the twin is slightly larger or smaller than N-bar, the sparse run's average size. The
curve removes this difference: between neighbouring dense runs, log loss is taken as linear in log N. The paper's claim
(arXiv 2501.12486) is that both gaps are 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.runs.trials import MATCH, Spread, Trial, differing, effective, key_of


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
        """The mean loss minus that of the dense curve at the same size; None without a curve."""
        return None if self.curve_loss is None else self.loss.mean - self.curve_loss


def compare(runs: Sequence[Trial]) -> list[Comparison]:
    """Return a comparison for each sparse configuration, the largest average size first.

    Raises:
        ValueError: All runs are sparse, or all are dense.
    """
    groups: dict[str, list[Trial]] = {}
    for run in runs:
        groups.setdefault(key_of(run.settings), []).append(run)
    sparse = [group for group in groups.values() if group[0].is_sparse]
    if not sparse or len(sparse) == len(groups):
        raise ValueError(
            f"the runs are all {'sparse' if sparse else 'dense'}: give sparse runs and dense ones of the same data, such as "
            "those of sweep=twin_pairs."
        )
    names = differing([group[0].settings for group in sparse])
    found = []
    for group in sparse:
        twins = groups.get(key_of(effective({**group[0].settings, MATCH: "average"}, is_sparse=False)), [])
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
        return key_of(
            {key: value for key, value in run.settings.items() if key.split(".")[0] not in ("sparsity", "model")}
        )

    return [run for run in runs if not run.is_sparse and recipe(run) == recipe(sparse)]
