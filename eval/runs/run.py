"""Run folders as read for a comparison: records, figures and sample, of finished runs and of runs in progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.runs.folders import named_places, run_folders
from train.plan.branch import branch_figures, read_branch
from train.plan.choices import choice_words
from train.plan.run import plan_run
from train.record.read import CONFIG, METRICS, SAMPLE, SUMMARY, is_number, read_config, read_records, read_summary
from train.record.siblings import counterpart, has_sparse_weights


@dataclass(frozen=True)
class Run:
    """One run folder. `figures` come from summary.json, or from config and records if the run is not finished."""

    name: str
    folder: Path
    records: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Any]
    is_finished: bool
    state: str
    sample: str = ""
    pair: int = 0
    """The number of the run's pair: a sparse run and its dense twin have the same."""

    @property
    def is_sparse(self) -> bool:
        """True if its weights have zeros from a mask, or will have if the run is not finished."""
        return has_sparse_weights(self.figures) or any("sparsity/density" in r for r in self.records)


def read_runs(patterns: Sequence[str]) -> list[Run]:
    """Return the runs that the names or patterns match, each once, in the order of the patterns.

    Raises:
        ValueError: A pattern matches no run.
    """
    folders: dict[Path, None] = {}
    for pattern in patterns:
        found = [folder for place in named_places(pattern) if place.is_dir() for folder in run_folders(place, METRICS)]
        if not found:
            raise ValueError(
                f"runs={pattern} holds no run: name folders with a {METRICS}, or a folder of such folders."
            )
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    runs = [read_run(folder) for folder in folders]
    return paired(distinctly_named(runs))


def read_run(folder: Path) -> Run:
    """Read a run's folder; a run that has not ended has the figures of its records."""
    records = read_records(folder / METRICS)
    summary, sample = folder / SUMMARY, folder / SAMPLE
    is_finished = summary.is_file()
    figures = read_summary(summary) if is_finished else figures_so_far(folder, records)
    return Run(
        name=folder.name,
        folder=folder,
        records=records,
        figures=figures,
        is_finished=is_finished,
        state="finished" if is_finished else state_words(records, figures, folder / METRICS),
        sample=sample.read_text(errors="replace", encoding="utf-8").rstrip() if sample.is_file() else "",
    )


def figures_so_far(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run without a summary: counts from its config, densities from its last record.

    The result is {} if the config is garbled or was written by another version of the project.
    """
    steps = [record for record in records if "train/loss" in record]
    try:
        config = read_config(folder / CONFIG)
        # The number of processes is not recorded; if the batch depends on it, the records tell the batch.
        plan, branch = plan_run(config, 1), read_branch(folder)
    except (OSError, ValueError):
        return {}
    last = steps[-1] if steps else {"train/tokens": plan.batch_tokens, "train/global_step": 1}
    batch_tokens = last["train/tokens"] // last["train/global_step"]
    linear, schedule = plan.counts.linear, plan.schedule
    density, average = (_share(last, f"sparsity/{name}") for name in ("density", "average_density"))
    return {
        "choices": choice_words(config, prunes=schedule is not None),
        "total_params": plan.counts.total,
        "linear_params": linear,
        "avg_linear_params": average * linear,
        "nonzero_linear_params": round(density * linear),
        "sparsity": 1 - density,
        "batch_tokens": batch_tokens,
        "learning_rate": config.trainer.learning_rate,
        "total_tokens": plan.num_steps * batch_tokens,
        "steps": plan.num_steps,
        "prune_start_step": schedule.start_step if schedule else None,
        **({"branch": branch_figures(branch)} if branch else {}),
    }


def state_words(records: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], metrics: Path) -> str:
    """Describe the progress of an unfinished run: its last step, and when it was recorded. The run may have ended."""
    if not records:
        return "not finished: no record yet"
    step = max(record["train/global_step"] for record in records)
    of = f" of {figures['steps']:,}" if "steps" in figures else ""
    heard = datetime.fromtimestamp(metrics.stat().st_mtime, UTC)
    return f"not finished: step {step:,}{of}, last record {heard:%Y-%m-%d %H:%M} UTC"


def distinctly_named(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with distinct names: runs with the same name get their parent folders' names in front."""
    named = list(runs)
    for depth in range(2, 8):
        taken = [run.name for run in named]
        named = [
            replace(run, name="/".join(run.folder.parts[-depth:])) if taken.count(run.name) > 1 else run
            for run in named
        ]
    return [replace(run, figures={**run.figures, "run_name": run.name}) for run in named]


def paired(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with their pairs numbered from 0: a dense twin gets the number of its sparse run."""
    sizes = ("linear_params", "avg_linear_params", "total_tokens")
    known = [
        run.figures
        for run in runs
        if "prune_start_step" in run.figures and all(is_number(run.figures.get(key)) for key in sizes)
    ]
    sparse_of: dict[str, str] = {}
    for figures in known:
        if has_sparse_weights(figures) and (twin := counterpart(figures, known)):
            sparse_of.setdefault(twin["run_name"], figures["run_name"])
    keys = [sparse_of.get(run.name, run.name) for run in runs]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [replace(run, pair=numbers[key]) for run, key in zip(runs, keys, strict=True)]


def _share(record: Mapping[str, Any], key: str) -> float:
    """Return a density from a record; 1 if there is none, as for a dense run."""
    return float(record[key]) if is_number(record.get(key)) else 1.0
