"""A run killed, preempted, damaged and starved of disk, many times: `make torture`, or by hand

    python -m tests.torture [--kills 20] [--damages 50] [--signals 6] [--seed 0] [--folder DIR]

Each trial ends with the finished run compared with one that nothing happened to: same records, same model to the last
bit. Prints a table of tried, survived, lost, and exits 1 where anything was lost. About a minute a trial on two cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.commands import run_command
from tests.interrupted import STEPS, interrupted, records_of, tensors_of
from tests.processes import LaunchedRun, launched, send
from tests.test_run import write_text
from train.checkpoints.layout import checkpoints, damage

Trial = Callable[[random.Random, LaunchedRun], None]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, preempt and damage a run, and see what is lost.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=50)
    parser.add_argument("--signals", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "text.jsonl")
    done = run_command(["launch", *interrupted(folder, "whole", "logger=none", "overwrite=true")])
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return 1
    whole, chance = folder / "runs" / "whole", random.Random(options.seed)
    table = {
        "SIGKILL to all, at any moment": tally(options.kills, chance, whole, kill_all),
        "SIGKILL to one rank": tally(max(1, options.kills // 4), chance, whole, kill_one),
        "SIGKILL while saving": tally(max(1, options.kills // 4), chance, whole, kill_while_saving),
        "SIGKILL while exporting": tally(max(1, options.kills // 8), chance, whole, kill_while_exporting),
        "SIGTERM and SIGUSR1": tally(options.signals, chance, whole, preempt),
        "files damaged": damage_files(options.damages, chance, whole),
    }
    print(f"\n{'':32}{'tried':>7}{'survived':>10}{'lost':>6}")
    for name, (tried, survived) in table.items():
        print(f"{name:32}{tried:>7}{survived:>10}{tried - survived:>6}")
    return 0 if all(tried == survived for tried, survived in table.values()) else 1


def tally(num_trials: int, chance: random.Random, whole: Path, trial: Trial) -> tuple[int, int]:
    """(tried, survived) of runs that `trial` interrupts once, or twice in every third."""
    survived = 0
    for number in range(num_trials):
        run_dir = whole.with_name("victim")
        shutil.rmtree(run_dir, ignore_errors=True)
        command = interrupted(whole.parents[1], "victim", "logger=none")
        for _ in range(2 if number % 3 == 2 else 1):
            with launched(command, run_dir) as run:
                trial(chance, run)
                run.wait(90)
        with launched(command, run_dir) as run:
            code = run.wait(180)
        is_same = code == 0 and records_of(run_dir) == records_of(whole) and models_agree(run_dir, whole)
        survived += is_same
        print(f"{trial.__name__} {number + 1}/{num_trials}: {'survived' if is_same else 'LOST'}", flush=True)
        if not is_same:
            print(run.stderr[-2000:], file=sys.stderr)
    return num_trials, survived


def models_agree(run_dir: Path, whole: Path) -> bool:
    return tensors_of(run_dir, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def kill_all(chance: random.Random, run: LaunchedRun) -> None:
    """At a random moment, the start of the processes and the evaluation included."""
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 15))
    else:
        reach(run, chance.randrange(1, STEPS + 1))
        time.sleep(chance.uniform(0, 0.5))
    run.kill_all()


def kill_one(chance: random.Random, run: LaunchedRun) -> None:
    reach(run, chance.randrange(1, STEPS - 3))
    for pid in run.ranks()[chance.randrange(2) :][:1]:
        send(pid, signal.SIGKILL)


def kill_while_saving(chance: random.Random, run: LaunchedRun) -> None:
    reach(run, chance.randrange(1, STEPS - 8))
    watch(run, lambda: any(run.run_dir.glob("checkpoints/.checkpoint-*.tmp")))
    time.sleep(chance.uniform(0, 0.02))
    run.kill_all()


def kill_while_exporting(chance: random.Random, run: LaunchedRun) -> None:
    watch(run, lambda: (run.run_dir / "model.tmp").exists())
    time.sleep(chance.uniform(0, 0.05))
    run.kill_all()


def preempt(chance: random.Random, run: LaunchedRun) -> None:
    reach(run, chance.randrange(1, STEPS - 3))
    run.process.send_signal(chance.choice([signal.SIGTERM, signal.SIGUSR1]))


def reach(run: LaunchedRun, step: int) -> None:
    watch(run, lambda: run.last_step() >= step)


def watch(run: LaunchedRun, condition: Callable[[], bool]) -> None:
    """Until `condition()`, or until the run is over: then there is nothing left to interrupt."""
    while run.process.poll() is None and not condition():
        time.sleep(0.002)


def damage_files(num_trials: int, chance: random.Random, whole: Path) -> tuple[int, int]:
    """A bit flipped, a tail cut off or a file removed, in any file of a checkpoint: survived if it is noticed."""
    survived = 0
    folder = checkpoints(whole / "checkpoints")[0]
    for _ in range(num_trials):
        victim = folder.with_name("victim")
        shutil.copytree(folder, victim)
        file = chance.choice(sorted(victim.iterdir()))
        data, kind = bytearray(file.read_bytes()), chance.choice(["flip", "cut", "remove"])
        if kind == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
        elif kind == "cut":
            file.write_bytes(data[: chance.randrange(len(data))])
        else:
            file.unlink()
        survived += damage(victim) is not None
        shutil.rmtree(victim)
    return num_trials, survived


if __name__ == "__main__":
    sys.exit(main())
