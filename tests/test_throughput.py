"""The figures of speed: what counts as training, the formula of MFU, and the figures on an unknown device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.compose import composed
from train.plan.run import plan_run
from train.pruning import RunSparsity
from train.speed import throughput
from train.speed.throughput import GIB, Lap, Speedometer, StepClock, speedometer
from train.trainer import PretrainingTrainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Watch:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def watch(monkeypatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(throughput, "time", watch)
    return watch


@pytest.fixture
def h100(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * GIB)


def test_a_lap_leaves_pauses_out_and_counts_waiting_for_data_in(watch):
    clock = StepClock(CPU)
    clock.start()
    watch.pass_seconds(2.0)
    with clock.pause():
        watch.pass_seconds(30.0)
    with clock.wait_for_data():
        watch.pass_seconds(0.5)
    assert clock.lap() == Lap(2.5, 0.5)
    watch.pass_seconds(1.0)
    assert clock.lap() == Lap(1.0, 0.0)


def test_what_came_before_the_start_does_not_count(watch):
    clock = StepClock(CPU)
    with clock.wait_for_data():
        watch.pass_seconds(5.0)
    clock.start()
    watch.pass_seconds(1.0)
    assert clock.lap() == Lap(1.0, 0.0)


def test_prune_events_evaluation_and_saving_are_pauses(watch, monkeypatch):
    clock = StepClock(CPU)
    clock.start()
    later: Any = lambda *args, **kwargs: watch.pass_seconds(7.0)  # noqa: E731
    monkeypatch.setattr("sparsity.callback.SparsityCallback.prune_at", later)
    callback = RunSparsity.__new__(RunSparsity)
    callback.clock = clock
    callback.prune_at(3)
    trainer: Any = SimpleNamespace(
        clock=clock,
        _write_checkpoint=later,
        evaluator=lambda model: later() or {"loss": 1.0},
        model_wrapped=None,
        log=lambda figures: None,
        state=SimpleNamespace(global_step=3),
    )
    PretrainingTrainer._save_checkpoint(trainer, torch.nn.Linear(1, 1))
    assert PretrainingTrainer.evaluate(trainer) == {"eval_loss": 1.0}
    assert watch.now == 121.0
    watch.pass_seconds(2.0)
    assert clock.lap().train_seconds == 2.0


def test_mfu_is_the_formulas_flops_over_the_devices_peak(h100):
    meter = Speedometer(flops_per_token=8.0e9, num_devices=4, device=GPU, peak=989.5)
    figures = meter.figures(num_tokens=500_000, lap=Lap(2.0, 0.25))
    assert figures == {
        "perf/tokens_per_second": 250_000.0,
        "perf/tokens_per_second_per_gpu": 62_500.0,
        "perf/tflops": 500.0,
        "perf/mfu": 500.0 / 989.5,
        "perf/data_wait_seconds": 0.25,
        "perf/peak_memory_gib": 3.0,
        "perf/peak_reserved_gib": 5.0,
    }


def test_the_runs_model_and_device_give_the_formulas_numbers(h100):
    config = composed("train", ["experiment=sparsellm-1b-80p"])
    plan = plan_run(config, world_size=1)
    meter = speedometer(plan, GPU, "bf16")
    layers, hidden, length = plan.model.num_hidden_layers, plan.model.hidden_size, plan.sequence_length
    assert meter.flops_per_token == 6 * plan.counts.linear + 12 * layers * hidden * length
    assert meter.peak == 989.5
    assert speedometer(plan, GPU, "fp8").peak == 1979.0


def test_an_unknown_gpu_says_so_once_and_logs_no_mfu(h100, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quantum 9000")
    meter = speedometer(plan_run(composed("train", []), 1), GPU, "bf16")
    for _ in range(3):
        figures = meter.figures(1000, Lap(1.0, 0.0))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Quantum 9000 has no bf16 peak" in said
    assert "perf/mfu" not in figures
    assert figures["perf/tflops"] > 0


def test_a_cpu_logs_tokens_and_waiting_alone_and_says_nothing(capsys):
    figures = speedometer(plan_run(composed("train", []), 2), CPU, "bf16").figures(1000, Lap(2.0, 0.5))
    assert figures == {"perf/tokens_per_second": 500.0, "perf/data_wait_seconds": 0.5}
    assert capsys.readouterr().err == ""
