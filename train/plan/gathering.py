"""The choice whether FSDP2 frees the weights gathered for a forward pass or keeps them for the backward pass."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import Config, ModelConfig
from train.plan.memory import Setting, gpu_memory
from train.plan.run import RunPlan

HEADROOM = 0.1
"""The share of a GPU's memory to leave free for the CUDA context, NCCL's buffers and fragmentation, as in a plan."""


def run_setting(config: Config, plan: RunPlan, device_bytes: int | None, headroom: float = HEADROOM) -> Setting:
    """Return the way in which the run computes on GPUs; the dtype is bfloat16 unless the config says otherwise.

    Args:
        config: The run's configuration.
        plan: Its plan for the number of processes.
        device_bytes: The memory of one GPU; None if it is unknown, and then `auto` frees the weights.
        headroom: The share of the memory to leave free.
    """
    trainer = config.trainer
    half = trainer.fp16 or trainer.bf16 is not False
    setting = Setting(
        world_size=plan.world_size,
        micro_batch_size=plan.micro_batch_size,
        sequence_length=plan.sequence_length,
        compute_bytes=2 if half else 4,
        accumulates=plan.gradient_accumulation_steps > 1,
        gradient_checkpointing=trainer.gradient_checkpointing,
        compiled=trainer.torch_compile,
        fused_loss=trainer.use_liger_kernel,
        update_state_bytes=plan.update.state_bytes,
        update_move_bytes=plan.update.move_bytes,
        uses_muon=trainer.optim == "muon",
    )
    asked = config.launch.reshard_after_forward
    if asked == "auto":
        budget = 0.0 if device_bytes is None else device_bytes * (1 - headroom)
        reshards = must_reshard(plan.model, plan.num_prunable, setting, budget)
    else:
        reshards = asked == "true"
    return replace(setting, reshard_after_forward=reshards)


def must_reshard(model: ModelConfig, num_prunable: int, setting: Setting, budget_bytes: float) -> bool:
    """Return whether a step exceeds `budget_bytes` if gathered weights are kept from forward to backward.

    Kept weights are gathered once per micro-batch instead of twice. This saves time even in a single process, in which a
    gather is only a cast and a copy.

    Args:
        model: The model.
        num_prunable: The number of prunable weights.
        setting: The way in which a step is computed.
        budget_bytes: The memory that a step may use.
    """
    kept = gpu_memory(model, num_prunable, replace(setting, reshard_after_forward=False))
    return kept.peak > budget_bytes
