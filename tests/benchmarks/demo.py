"""Measure tokens per second of a sparse run like the demo, with model=llama_tiny, against a plain torch loop, on one CPU.

    python -m tests.benchmarks.demo [--pairs 30] [key=value ...]     -> runs/bench/demo.json

Both are threads of one process that take turns, a step each, so that noise of the machine affects both. The loop is written
as anyone would write it: prepared batches, forward, backward, clip, fused AdamW. A step of the run is divided by the mean of
the loop's steps before and after it. If there is a C++ compiler, the run is also measured with `trainer.torch_compile=true`,
in a separate process. Exits with 1 if the uncompiled run processes less than 0.95 of the loop's tokens per second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from conf.compose import composed
from sparsity import Geometric, SparsityCallback
from tests.benchmarks.common import RESULTS, Comparison, beside, can_compile, finish, in_process, publish
from tests.benchmarks.turns import ALWAYS, EVENTS, WARM_UP, Turns, make_model, make_trainer, random_tokens, run_in_turns
from train.distributed import join_world
from train.plan.run import RunPlan, plan_run

MODULE = "tests.benchmarks.demo"
LEAST_SPEED = 0.95


class Laps(TrainerCallback):
    """A callback that takes turns with the loop and keeps the seconds from the start of a step to that of the next."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.seconds, self.started = turns, list[float](), 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.started:
            self.seconds.append(time.perf_counter() - self.started)
        self.turns.hand_over(0)
        self.turns.wait(0)
        self.started = time.perf_counter()


def plain_loop(plan: RunPlan, tokens: np.ndarray, turns: Turns) -> list[float]:
    """Return the seconds of each step of a loop written by hand."""
    model = make_model(plan).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = torch.from_numpy(tokens).view(plan.num_steps, plan.batch_size, plan.sequence_length)
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        for micro_batch in batch.split(plan.micro_batch_size):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss / plan.gradient_accumulation_steps
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        turns.hand_over(1)
        turns.wait(1)
    return seconds


def measure(pairs: int, overrides: Sequence[str] = ()) -> list[Comparison]:
    """Train both in this process, and return their comparison."""
    logging.set_verbosity_error()
    config = composed("train", [*ALWAYS, *overrides, f"trainer.max_steps={WARM_UP + pairs + 2}"])
    world = join_world(timeout_s=300)
    plan = plan_run(config, world.size)
    tokens = random_tokens(plan)
    turns, loop = Turns(), list[float]()
    laps = Laps(turns)
    sparsity = SparsityCallback(Geometric(sparsity=0.8, **EVENTS), report=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, plan, world, tokens, sparsity, [laps, sparsity], Path(folder))
        run_in_turns([trainer.train, lambda: loop.extend(plain_loop(plan, tokens, turns))], turns)
    details = {"model": plan.model.name, "batch_tokens": plan.batch_tokens}
    return [compare(laps.seconds[WARM_UP:], loop[WARM_UP:], details)]


def compare(run: list[float], loop: list[float], details: dict[str, Any]) -> Comparison:
    """Return the row of the laps: `ratio` is the run's tokens per second divided by the loop's."""
    ratios = beside(run, loop)
    ratio, step = statistics.median(ratios), statistics.median(loop)
    speed = {"pairs": len(ratios), "tokens_per_second": details["batch_tokens"] / (step * ratio)}
    return Comparison("step of the demo", step * ratio, "plain loop, not compiled", step, {**speed, **details})


def measured_rows(pairs: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Measure in a separate process, and return the rows as plain data."""
    torch.set_num_threads(1)
    return [asdict(found) for found in measure(pairs, overrides)]


def missed_goals(comparisons: Sequence[Comparison]) -> list[str]:
    found = comparisons[0].ratio
    return [f"The demo makes {found:.3f} of a plain loop's tokens, the goal is {LEAST_SPEED}."] * (found < LEAST_SPEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "demo.json")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model=llama_58m")
    options = parser.parse_args()
    cases = {"step of the demo": options.overrides}
    if can_compile("cpu"):
        cases["step of the demo, compiled by blocks"] = [*options.overrides, "trainer.torch_compile=true"]
    found = []
    for name, overrides in cases.items():
        # The run uses the CPU even if there is a GPU, because the loop does.
        rows = in_process(MODULE, "measured_rows", options.pairs, overrides, CUDA_VISIBLE_DEVICES="")
        found += [Comparison(**{**row, "name": name}) for row in rows]
    publish(found, options.output, ["pairs", "tokens_per_second"])
    finish(missed_goals(found))


if __name__ == "__main__":
    main()
