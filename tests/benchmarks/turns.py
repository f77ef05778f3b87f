"""Two loops that take turns, a step each, so that noise of the machine affects both; and the Trainer of a run."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, default_data_collator, set_seed

from conf.schema import Config
from sparsity import SparsityCallback
from train.arguments import training_arguments
from train.data import Blocks
from train.distributed import World
from train.faults.guard import StepGuard
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import Preemption
from train.model.build import llama_config
from train.plan.run import RunPlan
from train.speed.compiled import compile_by_blocks
from train.trainer import PretrainingTrainer, RunState

ALWAYS = (
    "experiment=demo",
    "model=llama_tiny",
    "batch_size=null",
    "trainer.save_strategy=no",
    "trainer.disable_tqdm=true",
)
"""The demo's run with a model four times as large; all figures so far were measured with it."""

EVENTS = {"start_step": 2, "end_step": 8, "every_steps": 2}
WARM_UP = 10


class Turns:
    """A lock for two threads that lets one work at a time; the first thread begins."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._left: set[int] = set()

    def wait(self, mine: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == mine)

    def hand_over(self, mine: int, leave: bool = False) -> None:
        with self._changed:
            if leave:
                self._left.add(mine)
            if 1 - mine not in self._left:
                self._turn = 1 - mine
            self._changed.notify_all()


def run_in_turns(bodies: Sequence[Callable[[], Any]], turns: Turns) -> None:
    """Run two functions as threads that take turns. A rank that fails exits at once; else its peers would wait forever."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work(mine: int) -> None:
        turns.wait(mine)
        try:
            if device is not None:
                # Each thread has its own current device, and a new thread starts with device 0.
                torch.cuda.set_device(device)
            bodies[mine]()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        turns.hand_over(mine, leave=True)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def random_tokens(plan: RunPlan) -> np.ndarray:
    """Return the number of random tokens that the run needs."""
    num_tokens = plan.batch_size * plan.num_steps * plan.sequence_length
    return np.random.default_rng(0).integers(plan.model.vocab_size, size=num_tokens)


def make_model(plan: RunPlan) -> LlamaForCausalLM:
    """Return the run's model, the same each time."""
    set_seed(0)
    return LlamaForCausalLM._from_config(llama_config(plan.model), dtype=torch.float32)


def make_trainer(
    config: Config,
    plan: RunPlan,
    world: World,
    tokens: np.ndarray,
    sparsity: SparsityCallback | None,
    callbacks: list[TrainerCallback],
    folder: Path,
) -> PretrainingTrainer:
    """Return the Trainer of a run on `tokens`, without records and evaluation."""
    model, arguments = make_model(plan), training_arguments(config, plan, folder)
    compile_by_blocks(model, arguments)
    trainer = PretrainingTrainer(
        world=world,
        sparsity=sparsity,
        run_state=RunState(identity={}),
        guard=StepGuard(world, Preemption(), config.max_skipped),
        heartbeat=Heartbeat(world.rank, world.size),
        batch_size=plan.batch_size,
        evaluator=lambda module: {},
        model=model,
        args=arguments,
        train_dataset=Blocks(tokens, plan.sequence_length),  # type: ignore[arg-type]
        eval_dataset=[],
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
