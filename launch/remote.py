"""A sweep that a Hydra plugin runs: the submitit launcher on SLURM, or the Optuna sweeper for a search."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from conf import cli
from conf.compose import composition_sentence
from conf.schema import Config
from conf.values import as_swept, override_of
from launch.alive import wait_for_live_jobs
from launch.command import import_environment, num_gpus, num_processes, printable
from launch.local import command_of, plan_jobs, say
from launch.machines import Machines
from launch.outcome import close_search, close_sweep
from launch.run import start_run
from launch.sweep import Job, Sweep, is_hydras, is_key, job_name, key_of
from train.faults.preempt import SIGNALS
from train.faults.stop import PREEMPTED_CODE
from train.plan.run import run_directory
from train.record.directory import RunDirectory
from train.record.read import is_number, read_summary

PLUGINS = {
    "submitit": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "optuna": ("hydra_plugins.hydra_optuna_sweeper", "search"),
}
"""The library that a choice of hydra/launcher or hydra/sweeper needs, and our extra that installs it."""


def check_plugins(arguments: Sequence[str]) -> None:
    """Check that the plugins of a command line are installed.

    Raises:
        ValueError: One is missing; the message says how to install it.
    """
    for item in arguments:
        for word, (module, extra) in PLUGINS.items():
            if key_of(item) in ("hydra/launcher", "hydra/sweeper", "sweep") and word in item and not _is_there(module):
                raise ValueError(f"{item} needs a plugin that is not installed: pip install 'sparsellm[{extra}]'.")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def sweep_elsewhere(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Plan all jobs, run the unfinished ones with Hydra's launcher, print the results, and return the exit code.

    Raises:
        ValueError: A job is invalid. No job was started.
    """
    launcher = sweep.launcher
    # The jobs inherit these variables: submitit starts them in the current folder with `python -m`.
    os.environ.update(import_environment(os.environ))
    if sweep.trial is not None:
        if sweep.trial.config.dry_run:
            print(printable(dry_command(sweep.trial, launcher)))
            return 0
        return search(sweep, arguments)
    sizes = {job.name: world_size(job.config, launcher) for job in sweep.jobs}
    planned = plan_jobs(sweep, sizes)
    if sweep.jobs[0].config.dry_run:
        for job in sweep.jobs:
            print(printable(dry_command(job, launcher)))
        return 0
    if wait_for_live_jobs(sweep, planned, say):
        planned = plan_jobs(sweep, sizes)
    waiting = [item.job for item in planned if item.finished is None]
    if not waiting:
        say("all jobs are already finished: nothing is submitted")
        return int(bool(close_sweep(sweep, {})))
    say(
        f"{launcher['name']}: {len(waiting)} {'jobs' if len(waiting) > 1 else 'job'}, output in {sweep.folder}/.submitit"
    )
    try:
        codes = launched(waiting, sweep, arguments)
    except RuntimeError as error:
        # submitit raises this if there is no SLURM or a job was cancelled; the other jobs keep running.
        say(f"error: {launcher['name']}: {' '.join(str(error).split())}")
        codes = {}
    return int(bool(close_sweep(sweep, codes)))


def launched(jobs: Sequence[Job], sweep: Sweep, arguments: Sequence[str]) -> dict[str, int]:
    """Run `jobs` with Hydra's launcher and wait for them; return their exit codes by name."""
    # A single run has no sweep folder, so submitit's files are written beside the run's folder.
    place = ["hydra.sweep.dir=${runs_dir}"] if sweep.name is None else []
    with hydra_context([*filter(is_hydras, arguments), *place, *jobs[0].overrides]) as (config, context):
        launcher = Plugins.instance().instantiate_launcher(context, run_job, config)
        returns = launcher.launch([job.overrides for job in jobs], 0)
    return {job.name: int(result.return_value) for job, result in zip(jobs, returns, strict=True)}


def search(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Run a search with Hydra's sweeper and print the best run; return the exit code, 75 if it was preempted."""
    assert sweep.trial is not None
    code = 0
    try:
        fixed = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sweep.fixed_keys)}]"
        own = [item for item in arguments if not is_key(item, "sweep_name")]
        with hydra_context([*own, override_of("sweep_name", str(sweep.name)), fixed]) as (config, context):
            sweeper = Plugins.instance().instantiate_sweeper(
                config=config, hydra_context=context, task_function=run_trial
            )
            sweeper.sweep(list(config.hydra.overrides.task))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except ValueError as error:
        if "No trials are completed" not in str(error):
            raise
        code = 1
    return max(close_search(sweep.folder), code)


@contextlib.contextmanager
def hydra_context(overrides: Sequence[str]) -> Iterator[tuple[DictConfig, HydraContext]]:
    """Yield the config of a sweep, and the context with which Hydra sets up its plugins.

    Raises:
        ValueError: The config cannot be composed.
    """
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            config = loader.load_configuration("train", list(overrides), RunMode.MULTIRUN)
        except HydraException as error:
            raise ValueError(composition_sentence(error, Config)) from error
        yield config, HydraContext(loader, Callbacks(config))


def run_job(cfg: DictConfig) -> int:
    """Run one planned job, in the process that Hydra's launcher started for it; return its exit code."""
    return run_here(cfg, list(HydraConfig.get().overrides.task))


def run_here(cfg: DictConfig, overrides: Sequence[str]) -> int:
    """Start a run, wait for it, and return its exit code.

    If SLURM preempts the job or its time is nearly up, the run saves a checkpoint, and submitit then requeues the job.
    """
    try:
        code = start_run(cli.typed(cfg), overrides)
    except cli.USER_ERRORS as error:
        say(f"error: {cfg.run_name}: {cli.sentence(error)}")
        return cli.USER_ERROR_CODE
    if code == PREEMPTED_CODE and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        requeue()
    return code


def run_trial(cfg: DictConfig) -> float | None:
    """Run one trial of a search, named after its values; return its held-out loss, or None if it did not finish or diverged."""
    settings = HydraConfig.get()
    overrides = [as_swept(item, Config) for item in settings.overrides.task]
    swept = {key_of(item) for item in overrides} - set(settings.job.config.override_dirname.exclude_keys)
    cfg.run_name = f"{cfg.sweep_name}/{job_name(overrides, swept)}"
    code = run_here(cfg, [*overrides, override_of("run_name", cfg.run_name)])
    if code in (PREEMPTED_CODE, *(-number for number in SIGNALS)) and "SUBMITIT_EXECUTOR" not in os.environ:
        # Hydra would catch an Exception and start the next trial; it does not catch SystemExit.
        sys.exit(PREEMPTED_CODE)
    summary = RunDirectory(run_directory(cli.typed(cfg))).summary
    loss = read_summary(summary).get("heldout_loss") if code == 0 and summary.exists() else None
    return float(loss) if is_number(loss) else None


def requeue() -> None:
    """Ask submitit to requeue this SLURM job; on the job's first node this does not return.

    submitit requeues in its handler of the preemption signal. Our own handlers replaced it while the run was being
    waited for, so the signal is raised again.
    """
    signal.raise_signal(getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")))


def world_size(config: Config, launcher: dict[str, Any]) -> int:
    """Return the number of processes that a job will have according to the launcher's settings."""
    if launcher["name"] == "submitit_local":
        return num_processes(config, num_gpus(os.environ))
    return num_processes(config, gpus_of_node(launcher)) * nodes_of(config, launcher)


def nodes_of(config: Config, launcher: dict[str, Any]) -> int:
    """Return the number of machines of each job."""
    return config.launch.num_machines or int(launcher.get("nodes") or 1)


def gpus_of_node(launcher: dict[str, Any]) -> int:
    """Return the number of GPUs per node in the SLURM settings: gpus_per_node=8, or gres=gpu:a100:8."""
    asked = re.fullmatch(r"gpu(?::[\w.-]+)?:(\d+)", str(launcher.get("gres") or ""))
    return int(launcher.get("gpus_per_node") or (asked[1] if asked else 0))


def dry_command(job: Job, launcher: dict[str, Any]) -> list[str]:
    """Return the command of the first node, with a placeholder for its address, which SLURM has not chosen yet."""
    nodes = nodes_of(job.config, launcher)
    machines = Machines(nodes, 0, "FIRST_NODE", 20_000) if nodes > 1 else Machines()
    return command_of(job, gpus_of_node(launcher), machines)
