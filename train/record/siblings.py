"""The finished runs with which a run is compared: those of its sweep, and its dense twin or, for a twin, its sparse run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import Config
from sparsity.common.text import count_text
from train.plan.run import RunPlan
from train.record.read import SUMMARY, read_summary
from train.record.table import cells

Figures = Mapping[str, Any]

TWIN_SUFFIXES = ("-small-dense", "-twin")
"""A dense twin is named like its sparse run with one of these appended; the first is that of the published series."""
TWIN_TOLERANCE = 0.05
"""The largest relative difference from N-bar at which a dense run with another name still counts as a match."""
SHARE_BY_CHANCE = 1e-3
"""The share of exact zeros that a dense run may have by chance; a larger share comes from a mask."""


def find_siblings(run_dir: Path, runs_dir: Path) -> list[dict[str, Any]]:
    """Return the summaries of the finished runs of the same sweep, each with its folder's name.

    For a run outside a sweep, only its twin counts, or the sparse run whose twin it is: `runs_dir` holds unrelated runs.
    """
    summaries = sorted(run_dir.parent.glob(f"*/{SUMMARY}"))
    if run_dir.parent.resolve() == runs_dir.resolve():
        name = run_dir.name
        pair = {name + suffix for suffix in TWIN_SUFFIXES} | {name.removesuffix(suffix) for suffix in TWIN_SUFFIXES}
        summaries = [path for path in summaries if path.parent.name in pair]
    found = [_read_summary(path) for path in summaries if path.parent.name != run_dir.name]
    return [summary for summary in found if summary is not None]


def _read_summary(path: Path) -> dict[str, Any] | None:
    """Return None if another version of the project wrote a summary that has no line in the table."""
    try:
        summary = read_summary(path)
        cells(finite(summary))
    except (ValueError, TypeError, KeyError, OSError):
        return None
    return summary if summary.keys() >= {"prune_start_step", "data", "perplexity_window"} else None


def is_sparse(figures: Figures) -> bool:
    """Return whether this run pruned."""
    return figures["prune_start_step"] is not None


def has_sparse_weights(figures: Figures) -> bool:
    """Return whether the finished weights are sparse: this run pruned them, or it kept the zeros of another run."""
    share = figures.get("sparsity")
    holds_zeros = isinstance(share, int | float) and share > SHARE_BY_CHANCE
    return figures.get("prune_start_step") is not None or holds_zeros


def counterpart(own: Figures, siblings: Sequence[Figures]) -> Figures | None:
    """Find the dense twin of a sparse run among its siblings, or the sparse run of a dense twin.

    It is the run with the matching name. If there is none, it is the run with the same number of tokens whose number of
    linear parameters is closest to N-bar, within TWIN_TOLERANCE.
    """
    others = [sibling for sibling in siblings if has_sparse_weights(sibling) != has_sparse_weights(own)]
    for other in others:
        dense, sparse = (other, own) if has_sparse_weights(own) else (own, other)
        if dense["run_name"] in [sparse["run_name"] + suffix for suffix in TWIN_SUFFIXES]:
            return other

    def distance(other: Figures) -> float:
        dense, sparse = (other, own) if has_sparse_weights(own) else (own, other)
        return abs(dense["linear_params"] / sparse["avg_linear_params"] - 1)

    near = [
        other for other in others if other["total_tokens"] == own["total_tokens"] and distance(other) <= TWIN_TOLERANCE
    ]
    return min(near, key=distance, default=None)


def match_words(config: Config, plan: RunPlan, own: Figures, siblings: Sequence[Figures]) -> str | None:
    """Return words for the run that should reach the same loss according to the paper; None for a plain dense run.

    A run that kept another model's zeros has no such run: its average density does not include that model's training.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        own: The run's figures.
        siblings: The figures of other finished runs.
    """
    if has_sparse_weights(own) and not is_sparse(own):
        return None
    twin = plan.twin
    # The rounded width of a derived twin may put it outside the tolerance, but its target is known exactly.
    other = counterpart({**own, "linear_params": twin.target_linear_params} if twin else own, siblings)
    if is_sparse(own):
        own_average = count_text(own["avg_linear_params"])
        if other is None:
            return (
                "none found among the finished runs; this run's command with `model.match=average` trains one of about "
                f"{own_average} linear parameters"
            )
        size = count_text(other["linear_params"])
        return f"`{other['run_name']}`, {size} linear parameters beside this run's {own_average} on average"
    average = other["avg_linear_params"] if other else twin.target_linear_params if twin else None
    if average is None:
        name, suffix = own["run_name"], TWIN_SUFFIXES[0]
        return f"`{name.removesuffix(suffix)}`, by its name" if name.endswith(suffix) else None
    amount = " by groups" if config.sparsity.groups else f" to {100 * config.sparsity.target:g}%"
    pruned = f"`{config.model.name}` pruned{amount}"
    name = f"`{other['run_name']}`" if other else pruned
    return (
        f"{name}, {count_text(average)} linear parameters on average, "
        f"beside this model's {count_text(own['linear_params'])}"
    )


def finite(row: Figures) -> dict[str, Any]:
    """Return the figures, with None for one that is not finite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
