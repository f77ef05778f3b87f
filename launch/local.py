"""A sweep on this machine: its jobs run one after another, or if there are enough GPUs, several at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.command import accelerate_command, child_environment, gpu_bytes, gpu_names, num_processes, printable
from launch.machines import Machines, find_machines
from launch.outcome import close_sweep
from launch.process import Task, run_children
from launch.run import exit_code
from launch.sweep import Job, Sweep, finished_job, places, refusal
from train.faults.stop import PREEMPTED_CODE
from train.model.initial_check import check_start
from train.plan.run import RunPlan, plan_run
from train.record.wandb_key import check_wandb


@dataclass(frozen=True)
class PlannedJob:
    job: Job
    plan: RunPlan
    finished: Mapping[str, Any] | None
    """The summary if an earlier command finished the run, else None."""


def plan_jobs(sweep: Sweep, world_size: Mapping[str, int]) -> list[PlannedJob]:
    """Plan every job for its number of processes.

    Args:
        sweep: The sweep.
        world_size: The number of processes of each job, by the job's name.

    Raises:
        ValueError: Some jobs are invalid; the message names all of them.
    """
    planned, mistakes = [], []
    for job in sweep.jobs:
        try:
            plan = plan_run(job.config, world_size[job.name])
            check_wandb(job.config.logger, os.environ)
            check_start(job.config, plan, job.overrides)
            planned.append(PlannedJob(job, plan, finished_job(job, plan)))
        except ValueError as error:
            mistakes.append(f"{job.name}: {error}")
    if mistakes:
        raise ValueError(refusal(mistakes, len(sweep.jobs)))
    return planned


def sweep_here(sweep: Sweep) -> int:
    """Run the unfinished jobs of a sweep on this machine.

    Returns:
        The exit code of the sweep: 0 if all jobs finished, 75 if it was interrupted, otherwise 1.

    Raises:
        ValueError: A job is invalid. No job was started.
    """
    gpus = gpu_names(os.environ)
    launch = sweep.jobs[0].config.launch
    sizes = {
        job.name: num_processes(job.config, len(gpus)) * find_machines(job.config.launch, os.environ).num
        for job in sweep.jobs
    }
    planned = plan_jobs(sweep, sizes)
    memory = gpu_bytes(os.environ)
    commands = {job.name: command_of(job, len(gpus), device_bytes=memory) for job in sweep.jobs}
    slots = places(launch, gpus)
    if sweep.jobs[0].config.dry_run:
        print("\n".join(printable(commands[job.name]) for job in sweep.jobs))
        return 0
    waiting = [item.job for item in planned if item.finished is None]
    tell_plan(sweep, planned, min(len(slots), len(waiting)))
    environment = child_environment(os.environ, len(gpus))
    together = len(slots) > 1 and len(waiting) > 1
    tasks = [
        Task(commands[job.name], environment, sweep.folder.parent / f"{job.name}.log" if together else None)
        for job in waiting
    ]

    def on_start(index: int) -> None:
        log = f", its words go to {tasks[index].log}" if tasks[index].log else ""
        say(f"\njob {index + 1} of {len(tasks)}: {waiting[index].name}{log}\n$ {printable(tasks[index].command)}")

    def on_end(index: int, code: int) -> None:
        if together or code:
            say(f"{waiting[index].name} {'ended' if code == 0 else f'failed with exit code {exit_code(code)}'}")

    codes = run_children(tasks, slots, on_start, on_end)
    is_stopped = PREEMPTED_CODE in codes or None in codes
    failed = close_sweep(sweep, {job.name: code for job, code in zip(waiting, codes, strict=True)})
    return PREEMPTED_CODE if is_stopped and failed else int(bool(failed))


def command_of(job: Job, gpus: int, machines: Machines | None = None, device_bytes: int | None = None) -> list[str]:
    machines = machines or find_machines(job.config.launch, os.environ)
    return accelerate_command(job.config, job.overrides, gpus, machines, device_bytes)


def tell_plan(sweep: Sweep, planned: Sequence[PlannedJob], at_a_time: int) -> None:
    num_done = sum(item.finished is not None for item in planned)
    say(f"sweep {sweep.name}: {len(planned)} jobs, {num_done} of them finished before, {at_a_time} at a time")
    for item in planned:
        state = "finished before" if item.finished is not None else f"{item.plan.num_steps:,} steps"
        say(f"  {item.job.name}  {state}")


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
