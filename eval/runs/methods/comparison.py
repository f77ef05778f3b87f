"""Finished runs by their way to prune: N-bar, training FLOPs and held-out loss over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.runs.methods.names import method_names
from eval.runs.trials import Spread, Trial, key_of


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
        groups.setdefault(key_of(trial.settings), []).append(trial)
    names = method_names([group[0].settings for group in groups.values()])
    dense = [group for group in groups.values() if not group[0].is_sparse]
    losses = {trial.seed: trial.loss for trial in dense[0]} if len(dense) == 1 else {}
    found = [_entry(name, group, losses) for name, group in zip(names, groups.values(), strict=True)]
    return sorted(found, key=lambda entry: entry.loss.mean)


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
        loss=Spread.of([trial.loss for trial in group]),
        bits_per_byte=Spread.of([trial.bits_per_byte for trial in group]),
        dense_gap=Spread.of(gaps) if gaps else None,
    )
