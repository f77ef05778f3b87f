"""Kill a run, preempt it, damage its files and fill its disk, many times: `make torture`, or by hand

    python -m tests.torture [--kills 20] [--damages 50] [--signals 10] [--seed 0] [--folder DIR] [--only WORDS]

Each trial compares the finished run with an undisturbed one: it must have the same records, and the same model to the last
bit. Prints a table of trials tried, survived and lost, and exits with 1 if any was lost. A trial takes about a minute on two
cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from conf.compose import composed
from launch.command import accelerate_command
from tests.commands import run_command
from tests.interrupted import STEPS, interrupted, records_of, tensors_of
from tests.processes import PYTHON_LAUNCH, LaunchedRun, descendants, is_alive, launched, send
from tests.test_run import write_text
from train.checkpoints.layout import checkpoints, newest_whole
from train.distributed import World
from train.faults.stop import PREEMPTED_CODE

PATIENCE_S = 900.0
"""The seconds in which a run must end: so many that other work on the machine does not count as a loss."""
ORPHANS_S = 10.0
"""The seconds in which ranks must end after their launcher."""

Trial = Callable[[random.Random, LaunchedRun], Container[int]]
"""A function that interrupts or damages a run, and returns the exit codes with which the run may end."""
ANY = range(-64, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, preempt and damage a run, and see what is lost.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=50)
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="", help="lines of the table whose name contains this")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "text.jsonl")
    done = run_command(["launch", *interrupted(folder, "whole", "logger=none", "overwrite=true")], timeout_s=PATIENCE_S)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return 1
    whole, chance = folder / "runs" / "whole", random.Random(options.seed)
    few, half = max(1, options.kills // 4), max(1, options.kills // 8)
    trials: dict[str, Callable[[], tuple[int, int]]] = {
        "SIGKILL to all, at any moment": lambda: tally(whole, chance, [kill_all] * options.kills),
        "SIGKILL to one rank": lambda: tally(whole, chance, [kill_one] * few),
        "SIGKILL to launcher or agent": lambda: tally(whole, chance, [kill_launcher, kill_agent] * half),
        "SIGKILL while saving": lambda: tally(whole, chance, [kill_while_saving] * few),
        "SIGKILL in a prune event": lambda: tally(whole, chance, [kill_in_an_event] * few, slow_events(folder)),
        "SIGKILL while exporting": lambda: tally(whole, chance, [kill_while_exporting] * half),
        "SIGTERM, SIGUSR1, SIGINT": lambda: tally(whole, chance, signals(options.signals)),
        "files damaged": lambda: damage_files(options.damages, chance, whole),
    }
    chosen = [name for name in trials if options.only in name]
    if not chosen:
        parser.error(f"--only {options.only} is in none of these names: {'; '.join(trials)}.")
    table = {name: trials[name]() for name in chosen}
    print(f"\n{'':32}{'tried':>7}{'survived':>10}{'lost':>6}")
    for name, (tried, survived) in table.items():
        print(f"{name:32}{tried:>7}{survived:>10}{tried - survived:>6}")
    return 0 if all(tried == survived for tried, survived in table.values()) else 1


def tally(
    whole: Path, chance: random.Random, trials: Sequence[Trial], start: Sequence[str] = PYTHON_LAUNCH
) -> tuple[int, int]:
    """Return (tried, survived) for runs that a trial interrupts once, or in every third trial twice."""
    survived = 0
    for number, trial in enumerate(trials):
        run_dir = whole.with_name("victim")
        shutil.rmtree(run_dir, ignore_errors=True)
        command = interrupted(whole.parents[1], "victim", "logger=none")
        codes = []
        for _ in range(2 if number % 3 == 2 else 1):
            with launched(command, run_dir, start, EVENTS_FILE=str(run_dir.with_name("event"))) as run:
                allowed = trial(chance, run)
                codes.append(run.wait(PATIENCE_S))
        is_expected = all(code in allowed for code in codes)
        with launched(command, run_dir) as run:
            codes.append(run.wait(PATIENCE_S))
        is_same = codes[-1] == 0 and records_of(run_dir) == records_of(whole) and models_agree(run_dir, whole)
        survived += is_expected and is_same
        name = trial.func.__name__ if isinstance(trial, partial) else trial.__name__
        outcome = "survived" if is_expected and is_same else "LOST"
        print(f"{name} {number + 1}/{len(trials)}: exit codes {codes}, {outcome}", flush=True)
        if outcome == "LOST":
            print(run.stderr[-2000:], file=sys.stderr, flush=True)
            shutil.move(run_dir, run_dir.with_name(f"lost-{name}-{number}"))
    return len(trials), survived


def models_agree(run_dir: Path, whole: Path) -> bool:
    return tensors_of(run_dir, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def slow_events(folder: Path) -> list[str]:
    """Return the command that `python -m launch` starts, with events so slow that the run can be killed during one."""
    command = accelerate_command(composed("train", interrupted(folder, "victim")), [], gpus=0)
    return [*command[: command.index("train")], "tests.slow_events"]


def kill_all(chance: random.Random, run: LaunchedRun) -> Container[int]:
    """Kill all processes at a random moment, which may be during their start or during the evaluation."""
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 15))
    else:
        reach(run, chance.randrange(1, STEPS + 1))
        time.sleep(chance.uniform(0, 0.5))
    run.kill_all()
    return ANY


def kill_one(chance: random.Random, run: LaunchedRun) -> Container[int]:
    reach(run, chance.randrange(1, STEPS - 3))
    for pid in run.ranks()[chance.randrange(2) :][:1]:
        send(pid, signal.SIGKILL)
    return ANY


def kill_launcher(chance: random.Random, run: LaunchedRun) -> Container[int]:
    reach(run, chance.randrange(1, STEPS - 3))
    below = descendants(run.process.pid)
    send(run.process.pid, signal.SIGKILL)
    return ANY if all_gone(below) else ()


def kill_agent(chance: random.Random, run: LaunchedRun) -> Container[int]:
    reach(run, chance.randrange(1, STEPS - 3))
    below = descendants(run.process.pid)
    for pid in below[:1]:
        send(pid, signal.SIGKILL)
    return ANY if all_gone(below) else ()


def all_gone(pids: Sequence[int]) -> bool:
    """Return whether the processes end by themselves in time."""
    deadline = time.monotonic() + ORPHANS_S
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        send(pid, signal.SIGKILL)
    return not left


def kill_while_saving(chance: random.Random, run: LaunchedRun) -> Container[int]:
    reach(run, chance.randrange(1, STEPS - 8))
    watch(run, lambda: any(run.run_dir.glob("checkpoints/.checkpoint-*.tmp")))
    time.sleep(chance.uniform(0, 0.02))
    run.kill_all()
    return ANY


def kill_in_an_event(chance: random.Random, run: LaunchedRun) -> Container[int]:
    begun = run.run_dir.with_name("event")
    begun.unlink(missing_ok=True)
    number = chance.randrange(1, 11)
    watch(run, lambda: begun.exists() and begun.read_text() == str(number))
    time.sleep(chance.uniform(0, 0.2))
    run.kill_all()
    # Without an event, tests.slow_events patches a function that nobody calls.
    return ANY if begun.exists() else ()


def kill_while_exporting(chance: random.Random, run: LaunchedRun) -> Container[int]:
    watch(run, lambda: (run.run_dir / "model.tmp").exists())
    time.sleep(chance.uniform(0, 0.05))
    run.kill_all()
    return ANY


def signals(num_trials: int) -> list[Trial]:
    """Return trials that send each signal only to the launcher, like a user, or to every process, like a cluster."""
    kinds = list(product((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), (False, True)))
    return [partial(preempt, *kinds[number % len(kinds)]) for number in range(num_trials)]


def preempt(number: signal.Signals, to_all: bool, chance: random.Random, run: LaunchedRun) -> Container[int]:
    """Send a signal at a step, or while the processes start if the run has already reached that step."""
    step = chance.randrange(1, STEPS - 3)
    if run.last_step() >= step:
        # Before Python runs, no process can handle a signal.
        time.sleep(chance.uniform(0.5, 10))
    reach(run, step)
    for pid in [run.process.pid, *(descendants(run.process.pid) if to_all else [])]:
        send(pid, number)
    # The exit code is 0 if the run was over before the signal came.
    return ANY if number == signal.SIGINT else (0, PREEMPTED_CODE)


def reach(run: LaunchedRun, step: int) -> None:
    watch(run, lambda: run.last_step() >= step)


def watch(run: LaunchedRun, condition: Callable[[], bool]) -> None:
    """Wait until `condition()` is true, or until the run is over and cannot be interrupted any more."""
    while run.process.poll() is None and not condition():
        time.sleep(0.002)


def damage_files(num_trials: int, chance: random.Random, whole: Path) -> tuple[int, int]:
    """Damage any file of the newest checkpoint: flip a bit, cut off its end, or remove it.

    A trial is survived if a single warning names that checkpoint and the previous one is chosen.
    """
    survived, alone = 0, World(0, 1, torch.device("cpu"))
    victim = whole.with_name("damaged")
    for _ in range(num_trials):
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(whole / "checkpoints", victim)
        newest, before = checkpoints(victim)[:2]
        file = chance.choice(sorted(newest.iterdir()))
        data, kind = bytearray(file.read_bytes()), chance.choice(["flip", "cut", "remove"])
        if kind == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
        elif kind == "cut":
            file.write_bytes(data[: chance.randrange(len(data))])
        else:
            file.unlink()
        chosen, warnings = newest_whole(victim, alone)
        survived += chosen == before and len(warnings) == 1 and newest.name in warnings[0]
    return num_trials, survived


if __name__ == "__main__":
    sys.exit(main())
