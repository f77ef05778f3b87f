"""FLOPs, days and network traffic of a run, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig
from train.plan.counts import count_parameters
from train.plan.counts import flops_per_token as flops_per_token

SECONDS_PER_DAY = 86_400
FORMULA = "tokens x (6 x linear parameters + 12 x layers x width x sequence length)"
# A prune event sums int64 counts over the ranks (sparsity.select): at most three histograms of 2^12 bins for the sample,
# two counts, three more histograms, a count of ties for each parameter and rank, and the kept weights of each parameter.
EVENT_COUNTS = 6 * (1 << 12) + 2
COUNT_BYTES = 8
REDUCED_BYTES = 4
"""The bytes of a gradient element while gradients are summed over the ranks."""


@dataclass(frozen=True)
class Flops:
    """The FLOPs of the whole run: `dense` counts all weights, as a GPU computes them; `average` only the active ones."""

    dense: float
    average: float


def training_flops(model: ModelConfig, avg_linear_params: float, sequence_length: int, total_tokens: int) -> Flops:
    """Return the FLOPs of a run.

    Args:
        model: The model.
        avg_linear_params: The number of linear weights that are active, averaged over the steps.
        sequence_length: The number of tokens in a block.
        total_tokens: The number of tokens of the run.
    """
    linear = count_parameters(model).linear
    return Flops(
        dense=total_tokens * flops_per_token(model, linear, sequence_length),
        average=total_tokens * flops_per_token(model, avg_linear_params, sequence_length),
    )


def training_days(flops: float, num_devices: int, peak_tflops: float, mfu: float) -> float:
    """Return the days that a run takes.

    Args:
        flops: The FLOPs of the run.
        num_devices: The number of GPUs.
        peak_tflops: The peak of one GPU in 1e12 FLOP/s.
        mfu: The share of the peak that the run reaches.
    """
    return flops / (num_devices * peak_tflops * 1e12 * mfu) / SECONDS_PER_DAY


def step_network_bytes(
    model: ModelConfig, world_size: int, compute_bytes: int, num_micro_batches: int, reshard_after_forward: bool = True
) -> int:
    """Return the bytes that one GPU receives in an optimizer step under FSDP2, with ring algorithms.

    Each micro-batch gathers the weights for its forward pass and, with `reshard_after_forward`, again for its backward
    pass; only the final norm and lm_head are kept between the two. The last micro-batch reduces and scatters the
    gradients, in float32 (train.distributed.reduce_in_float32).

    Args:
        model: The model.
        world_size: The number of GPUs.
        compute_bytes: The bytes of an element of the gathered weights.
        num_micro_batches: The number of micro-batches in a step.
        reshard_after_forward: Whether FSDP2 frees gathered weights after the forward pass.
    """
    counts = count_parameters(model)
    tail = (model.vocab_size + 1) * model.hidden_size
    gathered = num_micro_batches * (2 * counts.total - tail if reshard_after_forward else counts.total)
    return round((compute_bytes * gathered + REDUCED_BYTES * counts.total) * (world_size - 1) / world_size)


def event_network_bytes(num_parameters: int, world_size: int) -> int:
    """Return the bytes that one GPU receives in a prune event with this many parameters; ranks exchange only counts."""
    num_counts = EVENT_COUNTS + 2 * num_parameters + world_size
    return round(2 * COUNT_BYTES * num_counts * (world_size - 1) / world_size)
