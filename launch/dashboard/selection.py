"""The wandb runs of a dashboard, found by their group or by the wandb ids in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.schema import DashboardConfig, LoggerConfig
from eval.runs.folders import named_places, run_folders

UNQUOTABLE = "=<>!'\"\\"
"""Characters that wandb-workspaces would alter in the value of a filter."""


@dataclass(frozen=True)
class Selection:
    """The runs of one wandb project to show: those of `group`, or if that is None those with `run_ids`.

    An empty entity means the account's default one.
    """

    entity: str
    project: str
    words: str
    group: str | None = None
    run_ids: tuple[str, ...] = ()


def select(config: DashboardConfig) -> Selection:
    """Return the runs that the configuration names.

    Raises:
        ValueError: There are no such runs, or they cannot be shown together in wandb.
    """
    if config.sweep_name is not None:
        if set(UNQUOTABLE) & set(config.sweep_name):
            raise ValueError(
                f"sweep_name={config.sweep_name} holds one of {' '.join(UNQUOTABLE)}, which wandb's filters do not take: give "
                "the runs' folders with runs=."
            )
        project = config.project or LoggerConfig().project
        return Selection(config.entity or "", project, f"the runs of the group {config.sweep_name}", config.sweep_name)
    folders = [
        folder
        for pattern in config.runs
        for place in named_places(pattern)
        for folder in run_folders(place, "config.yaml")
    ]
    if not folders:
        raise ValueError(
            f"runs={','.join(config.runs)} holds no run: name folders with a config.yaml, or one above them."
        )
    loggers = [OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "logger", default={}) for folder in folders]
    ids = tuple(dict.fromkeys(wandb_id(folder) for folder in folders))
    return Selection(
        entity=config.entity or one_of_all("entity", loggers, folders) or "",
        project=config.project or one_of_all("project", loggers, folders) or LoggerConfig().project,
        words=f"{len(ids)} {'run' if len(ids) == 1 else 'runs'} of {', '.join(config.runs)}",
        run_ids=ids,
    )


def wandb_id(folder: Path) -> str:
    try:
        return (folder / "wandb" / "id.txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no wandb run, it was logged to metrics.jsonl alone: leave it out, or look at it with "
            f"python -m eval.report runs={folder}."
        ) from None


def one_of_all(key: str, loggers: Sequence[Any], folders: Sequence[Path]) -> str | None:
    """Return the value that all runs have for a key of their logger config.

    Args:
        key: The key, `entity` or `project`.
        loggers: The logger config of each run.
        folders: The folder of each run, for the error.

    Raises:
        ValueError: Values differ; the message names two such runs.
    """
    values = {logger.get(key): folder for logger, folder in zip(loggers, folders, strict=True)}
    if len(values) > 1:
        (one, here), (other, there) = list(values.items())[:2]
        raise ValueError(
            f"{here} is in the wandb {key} {one}, {there} in {other}: give {key}= for all, or runs of one {key}."
        )
    return next(iter(values))
