"""A sweep through a launcher or a sweeper of Hydra's: SLURM by submitit, a search by Optuna."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import cli
from conf.schema import Config
from launch.command import num_gpus, num_processes, printable
from launch.local import command_of, plan_jobs, say
from launch.machines import Machines
from launch.outcome import close_search, close_sweep
from launch.run import start_run
from launch.sweep import Job, Sweep, job_name, key_of
from train.directory import RunDirectory
from train.faults.stop import PREEMPTED_CODE
from train.plan import run_directory

PLUGINS = {
    "submitit": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "optuna": ("hydra_plugins.hydra_optuna_sweeper", "search"),
}
"""What a choice of hydra/launcher or hydra/sweeper needs, and the extra of this package that has it."""


def check_plugins(arguments: Sequence[str]) -> None:
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
    """Plan all jobs, hand them to Hydra's launcher, wait, and close the sweep; its exit code."""
    launcher = sweep.launcher
    planned = plan_jobs(sweep, {job.name: world_size(job.config, launcher) for job in sweep.jobs})
    if sweep.jobs and sweep.jobs[0].config.dry_run:
        for job in sweep.jobs:
            print(printable(dry_command(job, launcher)))
        return 0
    if planned and all(item.finished is not None for item in planned):
        say("all jobs were finished before: nothing is submitted")
        return int(bool(close_sweep(sweep, {})))
    if planned:
        say(
            f"{launcher['name']}: {len(planned)} {'jobs' if len(planned) > 1 else 'job'}, words in {sweep.folder}/.submitit"
        )
    own = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sweep.fixed_keys)}]"]
    if sweep.name is None:
        own.append("hydra.sweep.dir=${runs_dir}")
    elif "sweep_name" not in sweep.fixed_keys:
        own.append(f"sweep_name={sweep.name}")
    sys.argv[1:] = ["--multirun", *arguments, *own]
    hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")(run_job)()
    if not sweep.jobs:
        return close_search(sweep.folder)
    return int(bool(close_sweep(sweep, {})))


def run_job(cfg: DictConfig) -> float | None:
    """One job, called by Hydra's launcher where it is to run; the held-out loss, None where the run did not finish.

    On a preemption or before the time limit the run has saved a checkpoint: submitit puts the job back into the queue.
    """
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    if cfg.sweep_name is not None:
        fixed = set(settings.job.config.override_dirname.exclude_keys)
        swept = {key_of(item) for item in overrides} - fixed
        cfg.run_name = f"{cfg.sweep_name}/{job_name(overrides, swept)}"
        overrides.append(f"run_name={cfg.run_name}")
    try:
        config: Config = cli.typed(cfg)
        code = start_run(config, overrides)
    except cli.USER_ERRORS as error:
        say(f"error: {cfg.run_name}: {cli.sentence(error)}")
        return None
    if code == PREEMPTED_CODE and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        requeue()
    summary = RunDirectory(run_directory(config)).summary
    return float(json.loads(summary.read_text())["heldout_loss"]) if code == 0 and summary.exists() else None


def requeue() -> None:
    """Have submitit put this SLURM job back into the queue; on its first node this does not return.

    Its handler of the signal that announces the end does that; it was put aside while the run saved its checkpoint.
    """
    signal.raise_signal(getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")))


def world_size(config: Config, launcher: dict[str, Any]) -> int:
    """The processes that a job will have where the launcher puts it, as far as its settings tell."""
    if launcher["name"] == "submitit_local":
        return num_processes(config, num_gpus(os.environ))
    return num_processes(config, gpus_of_node(launcher)) * nodes_of(config, launcher)


def nodes_of(config: Config, launcher: dict[str, Any]) -> int:
    return config.launch.num_machines or int(launcher.get("nodes") or 1)


def gpus_of_node(launcher: dict[str, Any]) -> int:
    """GPUs of a node, as SLURM is asked for them; gres=gpu:a100:8 is another way to say 8."""
    asked = re.fullmatch(r"gpu(?::[\w.-]+)?:(\d+)", str(launcher.get("gres") or ""))
    return int(launcher.get("gpus_per_node") or (asked[1] if asked else 0))


def dry_command(job: Job, launcher: dict[str, Any]) -> list[str]:
    """What the first node would run; the address is known there only."""
    nodes = nodes_of(job.config, launcher)
    machines = Machines(nodes, 0, "FIRST_NODE", 20_000) if nodes > 1 else Machines()
    return command_of(job, gpus_of_node(launcher), machines)
