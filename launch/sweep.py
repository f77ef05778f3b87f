"""A sweep read from the command line: all its jobs are named and checked before the first one starts.

Finished jobs do not run again, so the same command resumes a sweep. Each job can also be resumed alone by its own command.
"""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf import schema
from conf.compose import composed, composition_sentence, prepared
from conf.schema import Config, LaunchConfig
from conf.values import as_swept, override_of, text_of
from train.plan.run import RunPlan
from train.record.directory import RunDirectory, is_restart

DEFAULT_NAME = "sweep"
NOT_IN_A_NAME = ("experiment", "sweep", "sweep_name", "launch", "dry_run", "overwrite", "resume", "logger", "runs_dir")
"""Keys that are not used to name a job when nothing is swept, because they do not describe the run."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep; `overrides` is its whole command line, including its run_name."""

    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """The run_name of the job, for messages."""
        return str(self.config.run_name or "the run")

    @property
    def command(self) -> str:
        """The command line that runs this job alone."""
        return shlex.join(["python", "-m", "launch", *self.overrides])


@dataclass(frozen=True)
class Sweep:
    """The jobs of `python -m launch -m ...`."""

    name: str | None
    """None if nothing is swept and the only run has its own name."""
    jobs: tuple[Job, ...]
    """Empty for a search, in which Optuna chooses the trials one by one."""
    trial: Job | None
    """The settings that all trials of a search share; None for other sweeps."""
    launcher: dict[str, Any]
    """The settings of Hydra's launcher and its `name`, which is `basic` for this machine."""
    fixed_keys: tuple[str, ...]
    """Keys that have the same value in all jobs, and so do not appear in the jobs' names."""
    folder: Path

    @property
    def is_local(self) -> bool:
        """True if there are jobs and they run on this machine."""
        return self.launcher["name"] == "basic" and bool(self.jobs)


def read_sweep(arguments: Sequence[str]) -> Sweep:
    """Return the sweep that a command line asks for.

    Args:
        arguments: The command line without its -m.

    Raises:
        ValueError: Some jobs are invalid, and the message names all of them; or two jobs would share a folder.
    """
    arguments = prepared("train", arguments, is_sweep=True)
    own = [item for item in arguments if not is_hydras(item)]
    try:
        overrides = OverridesParser.create().parse_overrides(own)
        hydra = hydra_settings([*(item for item in arguments if is_hydras(item)), *single_values(own)])
        params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
        overrides = [*OverridesParser.create().parse_overrides(params), *overrides]
        swept = {key_of(override.get_key_element()) for override in overrides if override.is_sweep_override()}
        is_search = hydra.runtime.choices["hydra/sweeper"] != "basic"
        # The intervals of a search have no values to check yet; everything else is checked as for a job.
        listed = [
            item for item in overrides if not is_search or not item.is_sweep_override() or item.is_discrete_sweep()
        ]
        (written,) = BasicSweeper.split_arguments(listed, None)
    except HydraException as error:
        raise ValueError(composition_sentence(error, Config)) from error
    combinations = [[as_swept(item, Config) for item in job] for job in written]
    keys = {key_of(override.get_key_element()) for override in overrides} | {"sweep_name"}
    name = next((text_of(item.split("=", 1)[1]) for item in own if is_key(item, "sweep_name")), None)
    has_own_name = name is None or any(is_key(item, "run_name") for item in own)
    is_one_run = not swept and not is_search and has_own_name
    # If nothing is swept, the job is named after its overrides.
    naming = swept or {key for key in keys if key.split(".")[0] not in NOT_IN_A_NAME}
    if is_one_run:
        name = None
    else:
        check_names(own)
        name = name or DEFAULT_NAME
    common = (
        [] if name is None or any(is_key(item, "sweep_name") for item in own) else [override_of("sweep_name", name)]
    )
    jobs, mistakes, taken = [], [], dict[str, str]()
    for values in combinations[:1] if is_search else combinations:
        run_name = [] if name is None or is_search else [override_of("run_name", f"{name}/{job_name(values, naming)}")]
        own_values = ", ".join(item for item in values if key_of(item) in swept) or "this run"
        try:
            if run_name and not job_name(values, naming):
                own_name = composed("train", [*values, *common]).run_name or "job"
                run_name = [override_of("run_name", f"{name}/{own_name}")]
            job = (*(item for item in values if not is_key(item, "dry_run")), *common, *run_name)
            jobs.append(Job(job, composed("train", [*values, *common, *run_name])))
        except ValueError as error:
            mistakes.append(f"{own_values}: {error}")
            continue
        if (other := taken.setdefault(jobs[-1].name, own_values)) is not own_values:
            raise ValueError(
                f"{other} and {own_values} would share the folder {jobs[-1].name}, so one of them would not run: give "
                "each value once, and put values that differ only in signs or separators into separate sweeps."
            )
    if mistakes:
        raise ValueError(refusal(mistakes, len(mistakes) + len(jobs)))
    launcher = {**hydra.launcher, "name": hydra.runtime.choices["hydra/launcher"]}
    folder = Path(jobs[0].config.runs_dir) / (name or "")
    trial = jobs.pop() if is_search else None
    return Sweep(name, tuple(jobs), trial, launcher, tuple(sorted(keys - naming)), folder)


def refusal(mistakes: Sequence[str], num_jobs: int) -> str:
    """Return one sentence about all invalid jobs."""
    if num_jobs == 1:
        return mistakes[0].removeprefix("this run: ")
    return (
        f"{len(mistakes)} of the sweep's {num_jobs} jobs are invalid, so none was started: "
        + "; ".join(mistake.rstrip(".") for mistake in mistakes)
        + "."
    )


def check_names(arguments: Sequence[str]) -> None:
    """Check that the jobs of a sweep get folders of their own.

    Raises:
        ValueError: `run_name` is set, which all jobs would share.
    """
    for item in arguments:
        if is_key(item, "run_name"):
            raise ValueError(f"{item} would put all jobs of a sweep in one folder: give sweep_name instead.")


def job_name(overrides: Sequence[str], keys: Container[str]) -> str:
    """Return a job's name: its values of `keys`, in characters that need no quotes in file systems and in Hydra."""
    own = sorted(item.lstrip("+") for item in overrides if key_of(item) in keys)
    return re.sub(r"[^\w.+]+", "-", "_".join(own)).strip("-")


def hydra_settings(overrides: Sequence[str]) -> Any:
    """Return the node `hydra` of the composed config: sweeper, launcher and choices."""
    schema.register()
    allow_own_launchers()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True).hydra


def allow_own_launchers() -> None:
    """Silence Hydra's warning about conf/hydra/launcher/: our files there have the names of submitit's launchers."""
    warnings.filterwarnings(
        "ignore", message=r"\s*'hydra/launcher/submitit_\w+' is validated against ConfigStore schema"
    )


def single_values(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that all jobs of a sweep share."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [item for item, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]


def key_of(item: str) -> str:
    """Return the dotted key of an override."""
    return item.split("=", 1)[0].lstrip("+~")


def is_key(item: str, key: str) -> bool:
    """Return whether an override sets `key`."""
    return key_of(item) == key


def is_hydras(item: str) -> bool:
    """Return whether an override is for Hydra itself."""
    return key_of(item).replace("/", ".").split(".")[0] == "hydra"


def places(launch: LaunchConfig, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Return, for each job that can run at a time, the environment variable that assigns its GPUs.

    Args:
        launch: The processes of a job, and how many jobs may run at a time.
        gpus: The GPUs of this machine.

    Raises:
        ValueError: The machine has too few GPUs.
    """
    asked, each = launch.parallel_jobs, launch.num_processes or len(gpus)
    if not gpus:
        return [{} for _ in range(asked or 1)]
    room = len(gpus) // each
    if asked is not None and asked > room:
        raise ValueError(
            f"launch.parallel_jobs={asked} jobs of {each} processes need {asked * each} GPUs, but there are {len(gpus)}: "
            f"use at most {room}, or fewer launch.num_processes."
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place * each : (place + 1) * each])} for place in range(asked or room)
    ]


def finished_job(job: Job, plan: RunPlan) -> dict[str, Any] | None:
    """Return the summary of a job that an earlier command finished, or None if the job must run."""
    return (
        None if job.config.overwrite and not is_restart(os.environ) else RunDirectory(plan.run_dir).finished(job.config)
    )
