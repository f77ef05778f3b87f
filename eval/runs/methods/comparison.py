"""Finished runs by their way to prune: N-bar, training FLOPs and held-out loss over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.runs.methods.names import method_names
from eval.runs.trials import SPARSITY, Spread, Trial, key_of
from sparsity.common.text import count_text


@dataclass(frozen=True)
class Entry:
    """The runs of one method: means over seeds, with the spread of the losses, in nats a token."""

    name: str
    is_sparse: bool
    avg_linear_params: float
    final_linear_params: float
    flops_average: float | None
    flops_dense: float | None
    """None if the FLOPs of a run are not known."""
    loss: Spread
    bits_per_byte: Spread
    dense_gap: Spread | None = None
    """Each seed's loss less that of the dense runs, over the seeds that both have; None without dense runs of one size."""


def entries_of(trials: Sequence[Trial]) -> list[Entry]:
    """Return an entry for each configuration, the lowest loss first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(_key(trial), []).append(trial)
    names = _distinct(method_names([_own_settings(group[0]) for group in groups.values()]), list(groups.values()))
    dense = [group for group in groups.values() if not group[0].is_sparse]
    losses = {trial.seed: trial.loss for trial in dense[0]} if len(dense) == 1 else {}
    found = [_entry(name, group, losses) for name, group in zip(names, groups.values(), strict=True)]
    return sorted(found, key=lambda entry: entry.loss.mean)


def _key(trial: Trial) -> str:
    """Return what the runs of one line have in common: for dense runs also their size, which no key of theirs need say."""
    size = {} if trial.is_sparse else {"linear_params": trial.avg_linear_params}
    return key_of({**_own_settings(trial), **size})


def _own_settings(trial: Trial) -> dict[str, Any]:
    """Return a run's settings; a dense twin's do not include those of the sparse run that it matches."""
    return {key: value for key, value in trial.settings.items() if trial.is_sparse or not key.startswith(SPARSITY)}


def _distinct(names: Sequence[str], groups: Sequence[Sequence[Trial]]) -> list[str]:
    """Return the names, with the size of runs whose names are the same."""
    return [
        f"{name}, {count_text(group[0].avg_linear_params)}" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def _by_seed(group: Sequence[Trial], figure: str) -> list[float]:
    """Return a figure's mean for each seed, so that a seed that was run twice counts once."""
    found: dict[int, list[float]] = {}
    for trial in group:
        found.setdefault(trial.seed, []).append(getattr(trial, figure))
    return [statistics.fmean(values) for values in found.values()]


def has_seeds(entries: Sequence[Entry]) -> bool:
    """Return whether several methods were run, one of them with several seeds."""
    return len(entries) > 1 and any(entry.loss.num > 1 for entry in entries)


def _entry(name: str, group: Sequence[Trial], dense: Mapping[int, float]) -> Entry:
    gaps = [trial.loss - dense[trial.seed] for trial in group if trial.seed in dense and trial.is_sparse]
    flops = [trial.flops for trial in group if trial.flops is not None]
    is_known = len(flops) == len(group)
    return Entry(
        name=name,
        is_sparse=group[0].is_sparse,
        avg_linear_params=statistics.fmean(trial.avg_linear_params for trial in group),
        final_linear_params=statistics.fmean(trial.final_linear_params for trial in group),
        flops_average=statistics.fmean(one.average for one in flops) if is_known else None,
        flops_dense=statistics.fmean(one.dense for one in flops) if is_known else None,
        loss=Spread.of(_by_seed(group, "loss")),
        bits_per_byte=Spread.of(_by_seed(group, "bits_per_byte")),
        dense_gap=Spread.of(gaps) if gaps else None,
    )
