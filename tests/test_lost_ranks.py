"""Bad numbers or a lost peer that only one rank sees are acted on or named by all ranks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.commands import ROOT, errors_in, quiet_environment
from tests.distributed import run_ranks
from train.faults.heartbeat import LOST_CODE, loss_sentence, nccl_error


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
    """Train for seven steps whose loss is NaN in step 3 and infinite in step 4, only on rank 1."""
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


class FakeGroup:
    """A process group whose backend for GPUs has been marked by torch's watchdog, or which has no such backend."""

    def __init__(self, mark: str | None) -> None:
        self.mark = mark

    def _get_backend(self, device: torch.device) -> Any:
        assert device.type == "cuda"
        if self.mark is None:
            raise RuntimeError("No backend type associated with device type cuda")
        # In a torch with CUDA, gloo also serves GPUs, and does not have this method.
        return object() if self.mark == "gloo" else self

    def get_error(self) -> SimpleNamespace:
        if self.mark == "unsupported":
            raise RuntimeError("Backend gloo does not support getError")
        return SimpleNamespace(name=self.mark)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], None),
        (["SUCCESS", None, "unsupported"], None),
        (["SUCCESS", None, "TIMEOUT"], "NCCL timeout"),
        (["gloo", "TIMEOUT"], "NCCL timeout"),
        (["COMM_ERROR"], "NCCL communication error"),
        (["REMOTE_ERROR"], None),
    ],
)
def test_only_what_this_rank_noticed_itself_is_an_nccl_error(marks, expected):
    assert nccl_error([FakeGroup(mark) for mark in marks]) == expected


NCCL_HANG = """
from datetime import timedelta
import torch, torch.distributed as dist
from train.faults.heartbeat import Heartbeat
store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=3))
values = torch.ones(8, device="cuda")
dist.all_reduce(values)
torch.cuda.synchronize()
heartbeat = Heartbeat(0, 1)
heartbeat.watch_nccl()
heartbeat.beat(7)
# A collective behind a kernel that takes longer than the timeout, as behind a peer that does not come.
torch.cuda._sleep(1 << 37)
dist.all_reduce(values)
values.sum().item()
print("came through", flush=True)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_a_rank_that_waits_in_nccl_says_so_before_torchs_watchdog_aborts_it():
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = subprocess.run(
        [sys.executable, "-c", NCCL_HANG], cwd=ROOT, env=quiet_environment({"CUDA_VISIBLE_DEVICES": devices}),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == LOST_CODE, done.stderr[-3000:]
    assert "came through" not in done.stdout
    assert "A collective failed in step 7" in errors_in(done.stderr)[0]
    assert "NCCL timeout" in errors_in(done.stderr)[0]
