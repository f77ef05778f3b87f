"""FLOPs, days and network traffic of a run, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.schema import ModelConfig
from train.plan.counts import count_parameters
from train.plan.counts import flops_per_token as flops_per_token

if TYPE_CHECKING:
    from train.plan.run import RunPlan

SECONDS_PER_DAY = 86_400
FORMULA = "tokens x (6 x linear parameters + 12 x layers x width x sequence length)"
# An event sums int64 counts over the ranks: at most three histograms of 2^12 bins for the sample, two counts, and three
# more histograms; for ties a count for each parameter and each rank; the kept weights of each parameter
# (sparsity.select).
EVENT_COUNTS = 6 * (1 << 12) + 2
COUNT_BYTES = 8
REDUCED_BYTES = 4
"""Bytes of a gradient element while gradients are summed over the ranks."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of the whole run: `dense` as a GPU computes them, including masked weights; `average` for active ones only."""

    dense: float
    average: float


def training_flops(model: ModelConfig, avg_linear_params: float, sequence_length: int, total_tokens: int) -> Flops:
    """Return the FLOPs of a run; `avg_linear_params` are the linear weights active on average."""
    linear = count_parameters(model).linear
    return Flops(
        dense=total_tokens * flops_per_token(model, linear, sequence_length),
        average=total_tokens * flops_per_token(model, avg_linear_params, sequence_length),
    )


def run_flops(plan: RunPlan, avg_linear_params: float) -> Flops:
    """Return the FLOPs of a run with what its method computes beyond the weights that are active in the forward pass.

    The convention is that of RigL (arXiv 1911.11134, its appendix on FLOPs). A step of a sparse model costs its forward pass,
    as much again for the gradients of its inputs, and as much again for those of its weights. `average` counts all three for
    active weights, but in a step that needs the gradients of all weights the third is a dense model's. Such steps are RigL's
    and GraNet's moves, all steps of the straight-through estimator, and the steps before the events of a score that needs
    gradients. The dense phases of AC/DC are in the average density. The forward passes over calibration text count in both.

    Args:
        plan: The run's plan.
        avg_linear_params: The linear weights that are active in the forward pass on average, planned or measured.
    """
    trained = training_flops(plan.model, avg_linear_params + plan.extra_linear, plan.sequence_length, plan.total_tokens)
    calibrated = _calibration_flops(plan)
    return Flops(trained.dense + calibrated.dense, trained.average + calibrated.average)


def _calibration_flops(plan: RunPlan) -> Flops:
    """Return the FLOPs of the forward passes that give a score its activations."""
    if plan.schedule is None or not plan.calibration:
        return Flops(0.0, 0.0)
    moves = plan.update.moves(plan.schedule.base, plan.num_steps)
    steps = sorted({*plan.schedule.events(), *moves})
    densities = [plan.schedule.density(step - 1) if step else 1.0 for step in steps]
    linear, tokens = plan.counts.linear, plan.calibration * plan.sequence_length
    active = [linear - (1 - density) * plan.num_prunable for density in densities]
    return Flops(
        dense=tokens * len(steps) * flops_per_token(plan.model, linear, plan.sequence_length) / 3,
        average=tokens * sum(flops_per_token(plan.model, one, plan.sequence_length) for one in active) / 3,
    )


def training_days(flops: float, num_devices: int, peak_tflops: float, mfu: float) -> float:
    """Return the days that `flops` take on `num_devices` at a share `mfu` of their peak."""
    return flops / (num_devices * peak_tflops * 1e12 * mfu) / SECONDS_PER_DAY


def step_network_bytes(
    model: ModelConfig, world_size: int, compute_bytes: int, num_micro_batches: int, reshard_after_forward: bool = True
) -> int:
    """Return the bytes that one GPU receives in an optimizer step under FSDP2, with ring algorithms.

    Each micro-batch gathers the weights for its forward pass and, with `reshard_after_forward`, again for its backward
    pass; only the final norm and lm_head are kept between the two. The last micro-batch reduces and scatters the
    gradients, in float32 (train.distributed.reduce_in_float32).
    """
    counts = count_parameters(model)
    tail = (model.vocab_size + 1) * model.hidden_size
    gathered = num_micro_batches * (2 * counts.total - tail if reshard_after_forward else counts.total)
    return round((compute_bytes * gathered + REDUCED_BYTES * counts.total) * (world_size - 1) / world_size)


def event_network_bytes(num_parameters: int, world_size: int) -> int:
    """Return the bytes that one GPU receives in a prune event with this many parameters; ranks exchange only counts."""
    num_counts = EVENT_COUNTS + 2 * num_parameters + world_size
    return round(2 * COUNT_BYTES * num_counts * (world_size - 1) / world_size)
