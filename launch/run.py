"""One run on this machine and its peers: planned, turned into accelerate's command, started and waited for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from conf.schema import Config
from launch.command import accelerate_command, child_environment, gpu_bytes, num_gpus, num_processes, printable
from launch.machines import find_machines
from launch.process import run_child
from train.directory import RunDirectory
from train.initial_check import check_start
from train.plan import plan_run
from train.wandb_key import check_wandb


def start_run(config: Config, overrides: Sequence[str]) -> int:
    """Start the run that `overrides` make and wait for it; its exit code. A ValueError says why it can't be."""
    gpus = num_gpus(os.environ)
    machines = find_machines(config.launch, os.environ)
    plan = plan_run(config, num_processes(config, gpus) * machines.num)
    check_wandb(config.logger, os.environ)
    command = accelerate_command(config, overrides, gpus, machines, gpu_bytes(os.environ))
    check_start(config, plan, overrides)
    if config.dry_run:
        print(printable(command))
        return 0
    if not config.overwrite:
        # A folder of another config is refused by the ranks too, but only seconds later.
        RunDirectory(plan.run_dir).finished(config)
    print(f"$ {printable(command)}", file=sys.stderr, flush=True)
    return run_child(command, child_environment(os.environ, gpus))


def exit_code(code: int) -> int:
    """As a shell has it: a process ended by signal N is 128 + N."""
    return code if code >= 0 else 128 - code
