"""Jobs of an earlier command that outlive it: a killed launcher leaves submitit's jobs running.

The jobs of a sweep on this machine end with their launcher (launch.process). Submitit's jobs continue by design. When the
same command is run again, it waits for them and then runs the unfinished jobs, so that no job runs twice.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.local import PlannedJob
from launch.sweep import Sweep
from sparsity.common.programs import run_program
from train.record.directory import RunDirectory

POLL_S = 5.0


def live_jobs(sweep: Sweep, planned: Sequence[PlannedJob]) -> list[str]:
    """Return the jobs of a sweep that run or wait in the queue: submitit's job numbers, or else names of runs in use."""
    numbers = job_numbers(sweep.folder) if sweep.name is not None else []
    is_slurm = sweep.launcher["name"] == "submitit_slurm"
    alive = queued(numbers) if is_slurm else [number for number in numbers if is_controller(number)]
    if alive:
        return [f"job {number}" for number in alive]
    return [item.job.name for item in planned if RunDirectory(item.plan.run_dir).is_in_use()]


def job_numbers(folder: Path) -> list[str]:
    """Return the numbers of a sweep's submitit jobs, read from the names of their folders; an array counts once."""
    names = {path.name.partition("_")[0] for path in (folder / ".submitit").glob("*") if path.is_dir()}
    return sorted(name for name in names if name.isdigit())


def queued(numbers: Sequence[str]) -> list[str]:
    """Return those of `numbers` that are waiting or running jobs of this user in SLURM."""
    if not numbers:
        return []
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%F"]
    try:
        done = run_program(command)
    except OSError:
        # There is no SLURM on this machine; submitit reports that later.
        return []
    return sorted(set(done.stdout.split()) & set(numbers))


def is_controller(number: str) -> bool:
    """Return whether the process with this number is submitit's controller of a local job."""
    try:
        return b"submitit" in Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return False


def wait_for_live_jobs(
    sweep: Sweep, planned: Sequence[PlannedJob], say: Callable[[str], None], poll_s: float = POLL_S
) -> bool:
    """Wait until no job of an earlier command is left; return False if there was none.

    Args:
        sweep: The sweep.
        planned: Its jobs.
        say: Prints a message to the user.
        poll_s: The seconds between two checks.

    Raises:
        ValueError: The sweep has overwrite=true, which would remove the files of those jobs.
    """
    alive = live_jobs(sweep, planned)
    if not alive:
        return False
    if sweep.jobs[0].config.overwrite:
        raise ValueError(
            f"{', '.join(alive)} of an earlier command are still running, and overwrite=true would start them again: end "
            "them, or leave out overwrite."
        )
    say(
        f"{', '.join(alive)} of an earlier command are still running: waiting for them; Ctrl-C stops waiting and leaves "
        "the jobs running"
    )
    while alive:
        time.sleep(poll_s)
        alive = live_jobs(sweep, planned)
    return True
