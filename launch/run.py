"""The start of one run on this machine: it is planned and checked, and `accelerate launch` is run and waited for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from conf.schema import Config
from launch.ahead import AgentAhead
from launch.command import accelerate_command, child_environment, gpu_bytes, num_gpus, num_processes, printable
from launch.commands import COMMANDS
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
    for note in notes_on_files(Path.cwd()):
        print(note, file=sys.stderr)
    if config.dry_run:
        print(printable(command))
        return 0
    # The ranks also refuse a folder in use or with another config, but only seconds later, when they hold the GPUs.
    directory = RunDirectory(plan.run_dir)
    if machines.rank == 0:
        # Rank 0, which claims the folder, is on this machine; the other machines may start later than it.
        directory.check_free()
    if not config.overwrite:
        directory.finished(config)
    print(f"$ {printable(command)}", file=sys.stderr, flush=True)
    return run_child(command, child_environment(os.environ, gpus), agent)


def notes_on_files(folder: Path) -> list[str]:
    """Return a note for each file of the user's in `folder` that `python -m` would run instead of one of our commands.

    The script `sparsellm` and the processes that it and `python -m launch` start do not see such files, and a conf.py or
    sparsity.py is in nobody's way (`sparsity.common.own_first`).
    """
    if folder.resolve() == Path(__file__).resolve().parents[1]:
        return []
    notes = []
    for name in dict.fromkeys(command.module.partition(".")[0] for command in COMMANDS.values()):
        files = [folder / f"{name}.py", folder / name / "__init__.py"]
        if file := next((file for file in files if file.exists()), None):
            notes.append(
                f"note: in this folder `-m {name}` runs {file} instead of sparsellm's: set PYTHONSAFEPATH=1, or type "
                "`sparsellm COMMAND` instead of `python -m`."
            )
    return notes


def exit_code(code: int) -> int:
    """Return a process's exit code as a shell reports it: 128 + N if signal N ended the process."""
    return code if code >= 0 else 128 - code
