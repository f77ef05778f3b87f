"""Signals, lost ranks, killed launchers and bad numbers: the run continues, or it ends soon and says why."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from launch.command import CONFIGS
from tests.commands import ROOT, quiet_environment
from tests.distributed import run_ranks
from tests.interrupted import STEPS, interrupted, one_error, records_of, tensors_of
from tests.processes import is_alive, launched, send
from train.checkpoints.layout import checkpoints, damage
from train.faults.heartbeat import LOST_CODE, loss_sentence, nccl_error

# A module's first test waits for several launches.
pytestmark = pytest.mark.timeout(900)


def errors_in(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def harmed(folder) -> dict[str, Any]:
    """Interrupt a run in four ways and start it again each time, the last time by torch's agent itself."""
    run_dir = folder / "runs" / "harmed"
    command = interrupted(folder, "harmed", "logger=none", "launch.max_restarts=1", "launch.num_processes=2")
    found: dict[str, Any] = {"run_dir": run_dir}

    config_file = str(CONFIGS / "cpu.yaml")
    plain = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config_file,
        "--main_process_port",
        "0",
    ]
    with launched(command, run_dir, [*plain, "-m", "train"]) as run:
        run.wait_for_step(3)
        ranks = run.ranks()
        run.process.send_signal(signal.SIGTERM)
        found["plain code"], found["plain words"] = run.wait(), run.stderr
        found["plain ranks"] = [pid for pid in ranks if is_alive(pid)]
        found["plain checkpoint"] = checkpoints(run_dir / "checkpoints")[0]
        found["plain damage"] = damage(found["plain checkpoint"])

    with launched(command, run_dir) as run:
        run.wait_for_step(9)
        ranks = run.ranks()
        send(run.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(is_alive(pid) for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        found["orphans"] = (len(ranks), [pid for pid in ranks if is_alive(pid)])

    with launched(command, run_dir) as run:
        run.wait_for_step(18)
        run.process.send_signal(signal.SIGUSR1)
        found["preempted code"], found["preempted words"] = run.wait(), run.stderr
        found["preempted damage"] = damage(checkpoints(run_dir / "checkpoints")[0])

    with launched(command, run_dir) as run:
        run.wait_for_step(33)
        send(run.ranks()[1], signal.SIGKILL)
        found["code"], found["words"] = run.wait(), run.stderr
    return found


def test_plain_accelerate_launch_saves_when_it_is_asked_to_end(harmed):
    """The exit code is that of torch's agent, 1; `launch.agent` takes the same arguments and exits with 75."""
    assert harmed["plain code"] not in (0, 75)
    assert "asked to stop and has saved a checkpoint" in harmed["plain words"]
    assert harmed["plain ranks"] == []
    assert harmed["plain damage"] is None


def test_ranks_end_within_ten_seconds_when_their_launcher_is_killed(harmed):
    assert harmed["orphans"] == (2, [])


def test_a_preempted_run_saves_says_so_once_and_ends_with_75(harmed):
    assert harmed["preempted code"] == 75, harmed["preempted words"][-3000:]
    assert len(errors_in(harmed["preempted words"])) == 1
    assert "asked to stop and has saved a checkpoint" in harmed["preempted words"]
    assert "Traceback" not in harmed["preempted words"]
    assert harmed["preempted damage"] is None


def test_a_run_that_lost_a_rank_restarts_itself_and_ends_as_if_nothing_had_happened(harmed, whole):
    assert harmed["code"] == 0, harmed["words"][-3000:]
    assert records_of(harmed["run_dir"]) == records_of(whole)
    assert tensors_of(harmed["run_dir"], "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def test_a_second_writer_is_refused_and_a_rank_that_hangs_is_named(folder):
    run_dir = folder / "runs" / "hanging"
    command = interrupted(folder, "hanging", "logger=none", "trainer.ddp_timeout=10", "trainer.max_steps=5000")
    with launched(command, run_dir) as run:
        run.wait_for_step(3)
        assert "in use by a live process" in one_error(command)
        ranks = run.ranks()
        send(ranks[1], signal.SIGSTOP)
        started = time.monotonic()
        code = run.wait()
        assert code not in (0, 75)
        # This covers the timeout, the survivors' grace, and the half minute that torch's agent gives the stopped rank to end.
        assert time.monotonic() - started < 120
        first = errors_in(run.stderr)[0]
        assert "rank 1 (in step" in first, run.stderr[-2000:]
        assert "does not answer" in first
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
        assert process.wait(15) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_process_at_once(number):
    with listening(at_step_ends=False, blocked=False) as process:
        process.send_signal(number)
        assert process.wait(15) == 75


@pytest.mark.parametrize("module", ["launch", "launch.agent"])
def test_a_launcher_heeds_signals_before_it_imports_what_takes_long(module):
    process = subprocess.Popen([sys.executable, "-m", module, "run_name=never"], cwd=ROOT, env=quiet_environment({}))
    try:
        deadline = time.monotonic() + 60
        while not catches(process.pid, signal.SIGUSR1) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 75
    finally:
        process.kill()


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has installed a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


class listening:
    """A process that listens for the cluster's signals, and is killed afterwards."""

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


def test_steps_of_the_shared_run_are_what_these_tests_count_on(whole):
    assert records_of(whole)[-1]["train/global_step"] == STEPS
