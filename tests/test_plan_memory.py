"""The memory, compute, network and disk in a plan."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import ModelConfig, PlanConfig
from launch.plan.request import read_request
from tests.benchmarks.memory import Case, measure
from train.plan.assumed import memory_of, peak_of
from train.plan.compute import event_network_bytes, flops_per_token, step_network_bytes, training_days
from train.plan.counts import count_parameters
from train.plan.devices import PEAK_TFLOPS
from train.plan.disk import checkpoint_bytes
from train.plan.figure import density_curve, draw_density
from train.plan.forecast import forecast
from train.plan.gathering import must_reshard
from train.plan.host_memory import host_memory, parse_bytes
from train.plan.memory import Setting, gpu_memory, largest_micro_batch
from train.plan.run import plan_run
from train.plan.text import run_text

ONE_B = ModelConfig(
    name="1b", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8,
    num_key_value_heads=8,
)  # fmt: skip
LINEAR = 1_139_277_824


def test_state_is_shared_out_over_the_ranks():
    one = gpu_memory(ONE_B, LINEAR, Setting(1, 1, 2048))
    many = gpu_memory(ONE_B, LINEAR, Setting(64, 1, 2048))
    assert (one.weights, one.gradients, one.moments, one.masks) == (
        4 * 1_204_881_408,
        4 * 1_204_881_408,
        8 * 1_204_881_408,
        LINEAR,
    )
    assert many.weights == 4 * -(-1_204_881_408 // 64)
    assert many.activations == one.activations


def test_muon_has_one_state_for_the_matrices_of_the_blocks_and_gathers_one_at_a_time():
    blocks = 16 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    found = gpu_memory(ONE_B, LINEAR, Setting(1, 1, 2048, uses_muon=True))
    assert found.moments == 8 * 1_204_881_408 - 4 * blocks
    assert found.transients["an update by Muon"] == 10 * 2048 * 8192 + 4 * 2048 * 2048
    adamw = checkpoint_bytes(ONE_B, LINEAR)
    assert adamw - checkpoint_bytes(ONE_B, LINEAR, uses_muon=True) == 4 * blocks


def test_activations_by_hand_at_1b():
    # Per block and token in bf16: 24 widths of norms, queries, keys, values and attention's output, 8 MLP widths, and
    # a float32 for each head; after the blocks the last norm.
    found = gpu_memory(ONE_B, LINEAR, Setting(64, 1, 2048))
    assert found.activations == 2048 * (16 * (24 * 2048 + 8 * 8192 + 4 * 8) + 8 * 2048)


def test_the_loss_of_the_1b_holds_three_float32_copies_of_its_logits():
    # FSDP2 adds, in bf16, the gathered lm_head with the last norm, and two blocks.
    found = gpu_memory(ONE_B, LINEAR, Setting(64, 1, 2048))
    gathered = 2 * (32001 * 2048 + 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048))
    assert found.transients["the loss"] == 2048 * 12 * 32000 + gathered


@pytest.mark.parametrize(
    ("measured", "change"),
    [
        (40_794_049_024, {}),
        (64_641_164_800, {"micro_batch_size": 16}),
        (45_613_574_656, {"accumulates": True}),
        (62_367_123_968, {"micro_batch_size": 16, "reshard_after_forward": True}),
    ],
)
def test_the_compiled_1b_takes_what_it_took_on_an_h200(measured, change):
    # torch.cuda.max_memory_allocated of `python -m tests.benchmarks.throughput --together`, see docs/gpu.md.
    setting = replace(Setting(1, 8, 2048, reshard_after_forward=False, compiled=True), **change)
    assert gpu_memory(ONE_B, 0, setting).peak == pytest.approx(measured, rel=0.01)


def test_checkpointing_and_a_fused_loss_save_memory():
    plain = gpu_memory(ONE_B, LINEAR, Setting(64, 8, 2048))
    saving = gpu_memory(ONE_B, LINEAR, Setting(64, 8, 2048, gradient_checkpointing=True))
    assert saving.activations == 8 * 2048 * (16 * 2 * 2048 + 8 * 2048)
    assert saving.peak < plain.peak
    fused = gpu_memory(ONE_B, LINEAR, Setting(64, 8, 2048, fused_loss=True))
    assert fused.transients["the loss"] < plain.transients["the loss"]


def test_accumulation_holds_whole_gradients_between_micro_batches():
    setting = Setting(64, 1, 2048)
    waiting = gpu_memory(ONE_B, LINEAR, Setting(64, 1, 2048, accumulates=True))
    assert waiting.waiting_gradients == 4 * 1_204_881_408
    assert waiting.peak - gpu_memory(ONE_B, LINEAR, setting).peak == 4 * 1_204_881_408


SEVEN_B = ModelConfig(
    name="7b", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32,
)  # fmt: skip


def test_kept_weights_are_the_whole_model_in_the_compute_type_until_the_backward_begins():
    freed = gpu_memory(ONE_B, LINEAR, Setting(64, 1, 2048))
    kept = gpu_memory(ONE_B, LINEAR, Setting(64, 1, 2048, reshard_after_forward=False))
    tail_and_two_blocks = 32001 * 2048 + 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048)
    more = {phase: kept.transients[phase] - freed.transients[phase] for phase in kept.transients}
    assert more == {
        "the loss": 2 * (1_204_881_408 - tail_and_two_blocks),
        "the last block's backward": 2 * (1_204_881_408 - tail_and_two_blocks),
        "the first block's backward": 0,
        "a prune event": 0,
    }
    # One process without FSDP2 gathers nothing.
    alone = [Setting(1, 1, 2048, fsdp=False, reshard_after_forward=choice) for choice in (True, False)]
    assert len({gpu_memory(ONE_B, LINEAR, setting).peak for setting in alone}) == 1


@pytest.mark.parametrize(
    ("model", "world_size", "micro_batch_size", "memory", "expected"),
    [
        (ONE_B, 1, 4, 80e9, False),
        (ONE_B, 64, 4, 80e9, False),
        # It fits if weights are freed, but not with the 2 GB of kept weights.
        (ONE_B, 1, 4, 35e9, True),
        (SEVEN_B, 64, 1, 141e9, False),
        (SEVEN_B, 64, 1, 24e9, True),
    ],
)
def test_gathered_weights_are_freed_only_where_the_step_would_not_fit(
    model, world_size, micro_batch_size, memory, expected
):
    linear = count_parameters(model).linear
    setting = Setting(world_size, micro_batch_size, 2048)
    assert must_reshard(model, linear, setting, memory) is expected
    assert gpu_memory(model, linear, setting).peak <= memory


def planned(*overrides: str) -> dict[str, Any]:
    request = read_request(["experiment=sparsellm-1b-80p", "devices=64", "runs_dir=none", *overrides])
    return forecast(request.runs[0], plan_run(request.runs[0], 64), request.plan)


def test_a_plan_states_the_choice_and_counts_what_it_costs():
    kept, freed = planned("launch.reshard_after_forward=false"), planned("launch.reshard_after_forward=true")
    assert planned("device_memory=141GB")["memory"] == kept["memory"]
    assert planned("device_memory=30GB")["memory"] == freed["memory"]
    assert (kept["memory"]["reshard_after_forward"], freed["memory"]["reshard_after_forward"]) == (False, True)
    assert freed["network"]["bytes_per_step"] > 1.4 * kept["network"]["bytes_per_step"]
    assert "gathered weights" in run_text(kept)


def test_the_largest_micro_batch_divides_the_share_and_fits():
    setting = Setting(64, 1, 2048)
    size, memory = largest_micro_batch(ONE_B, LINEAR, setting, share=64, budget_bytes=100e9)
    assert 64 % size == 0
    assert memory.peak <= 100e9
    doubled = gpu_memory(ONE_B, LINEAR, Setting(64, 2 * size, 2048, accumulates=2 * size < 64))
    assert doubled.peak > 100e9
    assert largest_micro_batch(ONE_B, LINEAR, setting, share=64, budget_bytes=1e9) is None


@pytest.mark.parametrize(
    ("text", "size"), [("141GB", 141 * 10**9), ("80GiB", 80 << 30), ("1.5TB", 15 * 10**11), ("24 GB", 24 * 10**9)]
)
def test_device_memory_is_read_with_its_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["GB", "-3GB", "nan", "12parsecs", "0GB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError, match="device_memory="):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("asked", "peak", "memory"),
    [
        ({}, 989.5, "80GB"),
        ({"device": "H200"}, 989.5, "141GB"),
        ({"device": "a100"}, 312.0, "80GB"),
        ({"device": "H100 NVL", "device_memory": "90GB"}, 835.5, "90GB"),
        ({"device": "MI300X", "device_memory": "192GB", "peak_tflops": 1307.4}, 1307.4, "192GB"),
    ],
)
def test_a_device_is_counted_with_its_own_peak_and_memory(asked, peak, memory):
    request = PlanConfig(**asked)
    assert (peak_of(request), memory_of(request)) == (peak, memory)


def test_a_device_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(
        ValueError, match=r"device=TPU is not in the table of GPUs: choose one of .*A100.* or give peak_tflops="
    ):
        peak_of(PlanConfig(device="TPU"))
    with pytest.raises(ValueError, match="or give device_memory=SIZE"):
        memory_of(PlanConfig(device="TPU", peak_tflops=100.0))


def test_every_device_of_the_table_has_a_memory():
    assert all(memory_of(PlanConfig(device=name)) for name in PEAK_TFLOPS)


def test_the_1b_costs_7_64_gflop_a_token():
    assert flops_per_token(ONE_B, LINEAR, 2048) == 6 * LINEAR + 12 * 16 * 2048 * 2048
    assert round(flops_per_token(ONE_B, LINEAR, 2048) / 1e9, 2) == 7.64
    # 50 % of 989.5 TFLOP/s are 64.8k tokens/s on one GPU.
    days = training_days(64_750 * 86_400 * flops_per_token(ONE_B, LINEAR, 2048), 1, 989.5, 0.5)
    assert days == pytest.approx(1, rel=0.001)


def test_network_traffic():
    assert step_network_bytes(ONE_B, 1, 2, 4) == event_network_bytes(113, 1) == 0
    total, tail = count_parameters(ONE_B).total, 32001 * 2048
    assert step_network_bytes(ONE_B, 2, 2, 1) == 4 * total - tail
    assert step_network_bytes(ONE_B, 2, 2, 1, reshard_after_forward=False) == 3 * total
    assert 2 * 8 * 6 * 2**12 < event_network_bytes(113, 1024) < 2 * 8 * (6 * 2**12 + 2 + 2 * 113 + 1024)


def test_average_flops_follow_the_schedule():
    request = read_request(["experiment=sparsellm-1b-80p", "runs_dir=none"])
    found = forecast(request.runs[0], plan_run(request.runs[0], 64), request.plan)
    compute, tokens = found["compute"], found["total_tokens_true"]
    saved = 6 * (LINEAR - found["avg_linear_params"]) * tokens
    assert compute["training_flops_dense"] - compute["training_flops_average"] == pytest.approx(saved)
    assert found["disk"]["checkpoint_bytes"] == 12 * 1_204_881_408 + LINEAR // 8
    assert found["schedule"]["compute_share_at_start"] == pytest.approx(0.25, abs=0.01)
    assert found["schedule"]["compute_share_at_end"] == pytest.approx(0.75, abs=0.01)


def test_the_curve_is_the_schedules_staircase(tmp_path):
    config = read_request(["experiment=sparsellm-1b-80p"]).runs[0]
    plan = plan_run(config, 64)
    steps, densities = density_curve(plan)
    area = sum((steps[i + 1] - steps[i]) * densities[i] for i in range(len(steps) - 1) if steps[i + 1] > steps[i])
    assert area / plan.num_steps == pytest.approx(plan.average_density)
    draw_density([plan], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_plan_of_70b_takes_under_3_seconds_and_1_gigabyte(tmp_path):
    root = Path(__file__).resolve().parents[1]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = ["experiment=sparsellm-1b-80p", "model=llama2_70b", "devices=1024", "format=json", "runs_dir=none"]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from launch.plan.__main__ import main; main({arguments!r});"
    # VmHWM is this program's own peak. ru_maxrss starts at the memory of the process that started it: pytest's.
    code += "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["total_params"] == 68_976_648_192
    # This is processor time, so that the test does not depend on other work on the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert int(done.stderr.split()[-1]) < 1e6
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_memory_model_is_within_a_quarter_of_a_measured_step():
    case = Case(
        "tiny", {"vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    )  # fmt: skip
    found = measure(case)
    assert abs(found["relative_error"]) < 0.25, found


def test_a_rank_of_the_70b_holds_a_layer_in_host_memory_not_the_model():
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    model = ModelConfig(name="70b", num_hidden_layers=80, **shape)
    found = host_memory(model, 64, "bfloat16", "5GB")
    # A layer has attention with eight key-value heads, an MLP of three matrices, and two norms.
    assert found.layer == 4 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192)
    assert found.shard == 4 * -(-count_parameters(model).total // 64)
    assert found.export == 5 * 10**9
    assert host_memory(ONE_B, 1, "float32", "5GB").export == 4 * 1_204_881_408


def test_the_plan_states_the_host_memory_of_a_rank():
    request = read_request(["experiment=sparsellm-1b-80p"])
    plan = forecast(request.runs[0], plan_run(request.runs[0], 8), request.plan)
    text = run_text(plan)
    assert "Host memory of a rank" in text
    assert plan["host_memory"]["start_bytes_on_cpus"] == sum(
        plan["host_memory"][key] for key in ("layer_bytes", "shard_bytes")
    )
