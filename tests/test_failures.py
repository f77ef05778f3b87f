"""Signals, lost ranks, killed launchers and bad numbers: the run goes on, or ends soon and says why."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.commands import ROOT, quiet_environment
from tests.distributed import run_ranks
from tests.interrupted import STEPS, interrupted, one_error, records_of, tensors_of
from tests.processes import is_alive, launched, send
from train.checkpoints.layout import checkpoints, damage
from train.faults.heartbeat import loss_sentence


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def test_a_preempted_run_saves_and_a_lost_rank_is_restarted_to_the_same_model(folder, whole):
    """SIGUSR1 to the launcher, the command again, SIGKILL to one rank: the agent starts the run again by itself."""
    run_dir = folder / "runs" / "preempted"
    command = interrupted(folder, "preempted", "logger=none", "launch.max_restarts=1", "overwrite=false")
    with launched(command, run_dir) as run:
        run.wait_for_step(9)
        run.process.send_signal(signal.SIGUSR1)
        assert run.wait(30) == 75, run.stderr[-3000:]
        assert len(errors_in(run.stderr)) == 1
        assert "asked to stop and has saved a checkpoint" in run.stderr
        assert "Traceback" not in run.stderr
    newest = checkpoints(run_dir / "checkpoints")[0]
    assert damage(newest) is None
    with launched(command, run_dir) as run:
        run.wait_for_step(33)
        send(run.ranks()[1], signal.SIGKILL)
        assert run.wait(120) == 0, run.stderr[-3000:]
    assert records_of(run_dir) == records_of(whole)
    assert tensors_of(run_dir, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def test_a_second_writer_is_refused_and_a_rank_that_hangs_is_named(folder):
    run_dir = folder / "runs" / "hanging"
    command = interrupted(folder, "hanging", "logger=none", "trainer.ddp_timeout=10", "trainer.max_steps=5000")
    with launched(command, run_dir) as run:
        run.wait_for_step(3)
        assert "in use by a live process" in one_error(command)
        ranks = run.ranks()
        send(ranks[1], signal.SIGSTOP)
        started = time.monotonic()
        code = run.wait(90)
        assert code not in (0, 75)
        assert time.monotonic() - started < 60
        first = errors_in(run.stderr)[0]
        assert "rank 1 (in step" in first, run.stderr[-2000:]
        assert "does not answer" in first
        assert not any(is_alive(pid) for pid in ranks)


def test_ranks_end_when_their_launcher_is_killed(folder):
    run_dir = folder / "runs" / "orphans"
    command = interrupted(folder, "orphans", "logger=none", "trainer.max_steps=5000")
    with launched(command, run_dir) as run:
        run.wait_for_step(3)
        ranks = run.ranks()
        assert len(ranks) == 2
        send(run.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(is_alive(pid) for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(is_alive(pid) for pid in ranks)


def test_numbers_that_stay_bad_end_the_run_behind_a_checkpoint(folder):
    command = interrupted(folder, "bad", "logger=none", "optim.learning_rate=1e30", "max_skipped=2")
    said = one_error(command)
    assert "not finite in 3 steps in a row, more than max_skipped=2" in said
    newest = checkpoints(folder / "runs" / "bad" / "checkpoints")[0]
    assert damage(newest) is None
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "rank-00000.safetensors").values())


LISTEN = """
import ctypes, os, signal, time
from train.faults.preempt import Preemption
preemption = Preemption()
preemption.at_step_ends = {at_step_ends}
preemption.listen()
print("ready", flush=True)
if {blocked}:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.siginterrupt(number, False)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
else:
    time.sleep(30)
"""


@pytest.mark.parametrize("blocked", [False, True], ids=["in Python", "inside a library's call"])
def test_a_second_signal_is_obeyed_at_once_and_an_echo_of_the_first_is_not(blocked):
    with listening(at_step_ends=True, blocked=blocked) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM


def test_a_signal_before_the_first_step_ends_the_process_at_once():
    with listening(at_step_ends=False, blocked=False) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(5) == 75


class listening:
    """A process that listens for the cluster's signals; killed afterwards."""

    def __init__(self, **options: bool) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTEN.format(**options)],
            cwd=ROOT, env=quiet_environment({}), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> subprocess.Popen[str]:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_bad_step_on_one_rank_is_skipped_by_all_and_still_counts(tmp_path):
    first, second = run_ranks(train_with_poison, 2, tmp_path)
    assert repr(first) == repr(second)
    weights, rates, skipped, losses = first
    changed = [weights[step] != weights[step - 1] for step in range(1, len(weights))]
    assert changed == [True, True, False, False, True, True]
    assert len(set(rates)) == len(rates)
    assert skipped == [0, 0, 0, 1, 2, 2, 2][: len(skipped)]
    assert [step for step, loss in enumerate(losses) if not math.isfinite(loss)] == [3, 4]


def train_with_poison(folder: Path) -> tuple[list[float], list[float], list[int], list[float]]:
    """Seven steps whose loss is NaN in steps 3 and infinite in step 4, on rank 1 alone."""
    from torch.utils.data import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from train.distributed import join_world
    from train.faults.guard import StepGuard
    from train.faults.heartbeat import Heartbeat
    from train.faults.preempt import Preemption
    from train.trainer import PretrainingTrainer, RunState

    class Numbers(Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = (torch.arange(8) * (index + 1)) % 32
            return {"input_ids": ids, "labels": ids}

    class Poisoned(PretrainingTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            poison = {3: float("nan"), 4: float("inf")}.get(self.state.global_step, 1.0)
            return super().compute_loss(*args, **kwargs) * (poison if world.rank == 1 else 1.0)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights.append(float(sum(param.detach().double().abs().sum() for param in model.parameters())))
            rates.append(trainer._get_learning_rate())
            skipped.append(guard.num_skipped)

    world = join_world(60)
    torch.manual_seed(0)
    weights: list[float] = []
    rates: list[float] = []
    skipped: list[int] = []
    guard = StepGuard(world, Preemption(), max_skipped=10)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=7, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        accelerator_config={"use_configured_state": True}, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_nan_inf_filter=False, average_tokens_across_devices=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Poisoned(
        world=world, evaluator=lambda module: {}, sparsity=None, run_state=RunState({}), guard=guard,
        heartbeat=Heartbeat(world.rank, world.size), batch_size=4, model=LlamaForCausalLM(config), args=arguments,
        train_dataset=Numbers(), callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    return weights, rates, skipped, trainer.step_losses().tolist()


@pytest.mark.parametrize(
    ("silent", "words"),
    [
        ({1: 12}, "rank 1 (in step 12) does not answer while the others are in step 13"),
        ({3: 7, 1: 12}, "rank 1 (in step 12), rank 3 (in step 7) do not answer"),
        ({}, "every rank still answers"),
        (None, "the launcher does not answer"),
    ],
)
def test_a_lost_rank_is_named_with_its_step(silent, words):
    assert words in loss_sentence(silent, 13)


def test_steps_of_the_shared_run_are_what_these_tests_count_on(whole):
    assert records_of(whole)[-1]["train/global_step"] == STEPS
