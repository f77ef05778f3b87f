"""The start of one run on this machine: it is planned and checked, and `accelerate launch` is run and waited for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from conf.schema import Config
from launch.ahead import AgentAhead
from launch.command import accelerate_command, child_environment, gpu_bytes, num_gpus, num_processes, printable
from launch.machines import find_machines
from launch.process import run_child
from train.model.initial_check import check_start
from train.plan.run import plan_run
from train.record.directory import RunDirectory
from train.record.wandb_key import check_wandb


def start_run(config: Config, overrides: Sequence[str], agent: AgentAhead | None = None) -> int:
    """Start the run that `overrides` make, wait for it, and return its exit code.

    Args:
        config: The run.
        overrides: The command line that makes it, from which the ranks compose it again.
        agent: A process that waits for the run's command; without it a new one is started.

    Raises:
        ValueError: The run is invalid.
    """
    gpus = num_gpus(os.environ)
    machines = find_machines(config.launch, os.environ)
    plan = plan_run(config, num_processes(config, gpus) * machines.num)
    check_wandb(config.logger, os.environ)
    command = accelerate_command(config, overrides, gpus, machines, gpu_bytes(os.environ))
    check_start(config, plan, overrides)
    if config.dry_run:
        print(printable(command))
        if file := file_in_the_way(Path.cwd()):
            print(
                f"note: typed in this folder, the command would run {file} instead of sparsellm's.",
                file=sys.stderr,
            )
        return 0
    if not config.overwrite:
        # The ranks also refuse a folder with another config, but only seconds later.
        RunDirectory(plan.run_dir).finished(config)
    print(f"$ {printable(command)}", file=sys.stderr, flush=True)
    return run_child(command, child_environment(os.environ, gpus), agent)


def file_in_the_way(folder: Path) -> Path | None:
    """Return a file of the user's in `folder` that `python -m train` would run instead of ours, or None.

    `python -m launch` protects its own processes from such files, but not a command that the user types.
    """
    own = Path(__file__).resolve().parents[1]
    names = ("train", "conf", "sparsity", "eval", "launch")
    files = [folder / f"{name}{ending}" for name in names for ending in (".py", "/__init__.py")]
    return next((file for file in files if file.exists() and folder.resolve() != own), None)


def exit_code(code: int) -> int:
    """Return a process's exit code as a shell reports it: 128 + N if signal N ended the process."""
    return code if code >= 0 else 128 - code
