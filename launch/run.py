"""One run on this machine and its peers: planned, turned into accelerate's command, started and waited for."""

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
        overrides: What makes it, for the ranks to compose again.
        agent: A process that waits for the run's command; without it a new one is started.

    Raises:
        ValueError: The run cannot be.
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
        # A folder of another config is refused by the ranks too, but only seconds later.
        RunDirectory(plan.run_dir).finished(config)
    print(f"$ {printable(command)}", file=sys.stderr, flush=True)
    return run_child(command, child_environment(os.environ, gpus), agent)


def file_in_the_way(folder: Path) -> Path | None:
    """Return a module of the user in a folder that `python -m train` would take for ours, or None.

    `python -m launch` protects its own processes; a command that a person types starts from the current folder.
    """
    own = Path(__file__).resolve().parents[1]
    names = ("train", "conf", "sparsity", "eval", "launch")
    files = [folder / f"{name}{ending}" for name in names for ending in (".py", "/__init__.py")]
    return next((file for file in files if file.exists() and folder.resolve() != own), None)


def exit_code(code: int) -> int:
    """Return the exit code as a shell has it: a process ended by signal N is 128 + N."""
    return code if code >= 0 else 128 - code
