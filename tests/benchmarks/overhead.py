"""Measure what sparsity costs in a training step without a prune event: a sparse run takes turns with a dense one.

    python -m tests.benchmarks.overhead [--pairs 60] [key=value ...]     -> runs/bench/overhead.json

Both are runs of this project, with its Trainer and FSDP2 on every GPU or on two CPU ranks. Their configuration is
`experiment=demo` (on GPUs a 162M model) and the overrides. In each rank they are two threads that take turns, a step each, so
that noise of the machine affects both. A sparse step is divided by the mean of the dense steps before and after it; the
median of these ratios is the overhead. Exits with 1 if it is above 1.01.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging

from conf.compose import composed
from launch.command import CONFIGS, DEFAULT_CPU_PROCESSES, child_environment, num_gpus
from sparsity import Geometric, SparsityCallback
from tests.benchmarks.common import RESULTS, Comparison, beside, clock, finish, publish, synchronize
from tests.benchmarks.turns import ALWAYS, EVENTS, WARM_UP, Turns, make_trainer, random_tokens, run_in_turns
from train.distributed import join_world
from train.faults.process import end_process
from train.plan.run import plan_run

MOST_OVERHEAD = 1.01
ON_GPU = ("model=llama_162m", "trainer.per_device_train_batch_size=8")


class Laps(TrainerCallback):
    """A callback that keeps the seconds from one step's start to the next; ranks start each lap together."""

    def __init__(self, turns: Turns, mine: int, device: str) -> None:
        self.turns, self.mine, self.device = turns, mine, device
        self.seconds: list[float] = []
        self.started: float | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        if self.started is not None:
            self.seconds.append(time.perf_counter() - self.started)
        self.turns.hand_over(self.mine)
        self.turns.wait(self.mine)
        dist.barrier()
        self.started = time.perf_counter()


class TimedEvents(SparsityCallback):
    """A callback that keeps the seconds of each event."""

    def __init__(self, schedule: Geometric, device: str) -> None:
        super().__init__(schedule)
        self.device, self.seconds = device, list[float]()

    def prune_at(self, step: int, optimizer: Any = None) -> None:
        self.seconds.append(clock(lambda: super(TimedEvents, self).prune_at(step, optimizer), self.device)[0])


def rank_main(pairs: int, overrides: Sequence[str], output: Path) -> None:
    """Run one rank of both runs; rank 0 writes the seconds of laps and events, each that of the slowest rank."""
    logging.set_verbosity_error()
    # A lap ends where the next step begins, so the last step has none.
    config = composed("train", [*overrides, f"trainer.max_steps={WARM_UP + pairs + 2}"])
    world = join_world(timeout_s=300)
    plan = plan_run(config, world.size)
    turns, device = Turns(), world.device.type
    dense_laps, sparse_laps = Laps(turns, 0, device), Laps(turns, 1, device)
    sparsity = TimedEvents(Geometric(sparsity=0.8, **EVENTS), device)
    tokens = random_tokens(plan)
    trainers = []
    for laps, pruning in ((dense_laps, None), (sparse_laps, sparsity)):
        callbacks = [laps] if pruning is None else [laps, pruning]
        trainer = make_trainer(config, plan, world, tokens, pruning, callbacks, output.parent / "run")
        trainers.append(trainer)
    run_in_turns([trainer.train for trainer in trainers], turns)

    seconds = [dense_laps.seconds, sparse_laps.seconds, sparsity.seconds]
    slowest = torch.tensor([*chain(*seconds)], dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dense, sparse, events = slowest.cpu().split([len(part) for part in seconds])
    if world.is_main:
        figures = {"dense": dense[WARM_UP:].tolist(), "sparse": sparse[WARM_UP:].tolist(), "events": events.tolist()}
        details = {"model": plan.model.name, "num_params": plan.counts.total, "batch_tokens": plan.batch_tokens}
        details |= {"device": device, "ranks": world.size}
        output.write_text(json.dumps({**figures, "details": details}))
    world.leave()


def measure(pairs: int, overrides: Sequence[str] = ()) -> list[Comparison]:
    """Train both runs through accelerate on this machine's devices, and return their comparisons."""
    gpus = num_gpus(os.environ)
    overrides = [*ALWAYS, *(ON_GPU if gpus else ()), *overrides]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "laps.json")
        accelerate_config = str(CONFIGS / ("gpu.yaml" if gpus else "cpu.yaml"))
        command = [sys.executable, "-m", "launch.agent", "--config_file", accelerate_config]
        command += ["--num_processes", str(gpus or DEFAULT_CPU_PROCESSES), "--main_process_port", "0"]
        command += ["-m", "tests.benchmarks.overhead", "--rank", str(output), "--pairs", str(pairs), *overrides]
        subprocess.run(command, env=child_environment(os.environ, gpus), check=True, stdout=sys.stderr)
        return compare(**json.loads(output.read_text()))


def compare(dense: list[float], sparse: list[float], events: list[float], details: dict[str, Any]) -> list[Comparison]:
    """Return the rows of the laps; each sparse lap is between two dense ones. The first event, a warm-up, is left out.

    The seconds of a sparse step are those of a dense one times the median of the paired ratios, because the two medians
    would also differ by other work on the machine.
    """
    ratios = beside(sparse, dense)
    # The standard error of a median is 1.2533 times that of a mean. The deviation comes from the quartiles, so that single
    # slow steps do not count.
    quartiles = statistics.quantiles(ratios, n=4)
    error = 1.2533 * (quartiles[2] - quartiles[0]) / 1.349 / len(ratios) ** 0.5
    paired = {"overhead": statistics.median(ratios), "overhead_error": error, "pairs": len(ratios)}
    step, event = statistics.median(dense), statistics.median(events[1:])
    paired["tokens_per_second"] = details["batch_tokens"] / (step * paired["overhead"])
    return [
        Comparison("sparse step", step * paired["overhead"], "dense step", step, {**paired, **details}),
        Comparison("prune event", event, "dense step", step, {"events": len(events), **details}),
    ]


def missed_goals(comparisons: Sequence[Comparison]) -> list[str]:
    overhead = comparisons[0].details["overhead"]
    if overhead <= MOST_OVERHEAD:
        return []
    return [f"A sparse step takes {overhead:.4f} times a dense one, the goal is at most {MOST_OVERHEAD}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    parser.add_argument("--rank", type=Path, help="the body of one rank, started by this script")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model=llama_58m")
    options = parser.parse_args()
    if options.rank:
        rank_main(options.pairs, options.overrides, options.rank)
        end_process(0)
    found = measure(options.pairs, options.overrides)
    publish(found, options.output, ["overhead", "overhead_error", "tokens_per_second", "device", "ranks"])
    finish(missed_goals(found))


if __name__ == "__main__":
    main()
