"""Everything that is known about a run before it starts, as one plain dictionary. JSON and text are made from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conf.schema import Config, PlanConfig
from sparsity.registry import name_of
from train.plan.assumed import memory_of, peak_of
from train.plan.choices import choice_words
from train.plan.compute import (
    FORMULA,
    event_network_bytes,
    run_flops,
    step_network_bytes,
    training_days,
)
from train.plan.disk import checkpoint_bytes, export_bytes
from train.plan.gathering import run_setting
from train.plan.host_memory import HostMemory, host_memory, parse_bytes
from train.plan.memory import GpuMemory, Setting, gpu_memory, largest_micro_batch
from train.plan.rate import decay_start, warmup_length
from train.plan.run import RunPlan
from train.plan.series import table_row


def forecast(config: Config, plan: RunPlan, request: PlanConfig) -> dict[str, Any]:
    """Return a run's line of the table, and its schedule, batch, compute, memory, network and disk space, by name.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        request: The GPU and efficiency to assume.
    """
    row = table_row(config, plan)
    num_prunable = plan.num_prunable
    setting = run_setting(config, plan, parse_bytes(memory_of(request)), request.memory_headroom)
    flops = run_flops(plan, row["avg_linear_params"])
    days = training_days(flops.dense, plan.world_size, peak_of(request), request.mfu)
    twin = plan.twin
    own_steps = plan.num_steps - (plan.past.step if plan.past else 0)
    return {
        **row,
        "run_dir": str(plan.run_dir),
        "choices": choice_words(config, prunes=plan.schedule is not None),
        "schedule": {**_schedule(config, plan), "learning_rate": _rate(config, plan)},
        "branch": None
        if plan.past is None
        else {
            "from": config.branch_from,
            "step": plan.past.step,
            "density": plan.past.density,
            "steps": own_steps,
            "tokens": own_steps * plan.batch_tokens,
            "training_flops_dense": flops.dense * own_steps / plan.num_steps,
        },
        "twin": None
        if twin is None
        else {
            "hidden_size": twin.model.hidden_size,
            "intermediate_size": twin.model.intermediate_size,
            "target_linear_params": twin.target_linear_params,
            "linear_params": twin.linear_params,
            "relative_error": twin.relative_error,
        },
        "batch": {
            "devices": plan.world_size,
            "sequences": plan.batch_size,
            "sequence_length": plan.sequence_length,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "tokens_per_step": plan.batch_tokens,
        },
        "compute": {
            "formula": FORMULA,
            "training_flops_dense": flops.dense,
            "training_flops_average": flops.average,
            "mfu": request.mfu,
            "device": None if request.peak_tflops else request.device,
            "peak_tflops": peak_of(request),
            "seconds_per_step": days * 86_400 / plan.num_steps,
            "days": days * own_steps / plan.num_steps,
        },
        "memory": {
            **_memory(gpu_memory(plan.model, num_prunable, setting)),
            "reshard_after_forward": setting.reshard_after_forward,
            "optimizer": "Muon and AdamW" if setting.uses_muon else "AdamW",
        },
        "host_memory": _host(
            host_memory(plan.model, plan.world_size, config.export.dtype, config.export.max_shard_size)
        ),
        "fits": _largest_fit(plan, num_prunable, _leanest(config, setting), request),
        "network": {
            "bytes_per_step": step_network_bytes(
                plan.model,
                plan.world_size,
                setting.compute_bytes,
                plan.gradient_accumulation_steps,
                setting.reshard_after_forward,
            ),
            "bytes_per_prune_event": sum(event_network_bytes(len(pool.names), plan.world_size) for pool in plan.pools),
        },
        "disk": {
            "checkpoint_bytes": checkpoint_bytes(plan.model, num_prunable, plan.update.state_bytes, setting.uses_muon),
            "export_bytes": export_bytes(plan.model, config.export.dtype),
            "export_dtype": config.export.dtype,
        },
    }


def _schedule(config: Config, plan: RunPlan) -> dict[str, Any]:
    schedule = plan.schedule
    if schedule is None:
        return {"steps": plan.num_steps, "prune_start_step": None, "prune_end_step": None}
    return {
        "steps": plan.num_steps,
        "kind": name_of(schedule),
        "update": config.sparsity.update,
        "normalize": config.sparsity.normalize,
        "scope": config.sparsity.scope,
        "pattern": config.sparsity.pattern,
        "score": config.sparsity.score,
        "groups": [{"include": group.include, "target": group.target} for group in config.sparsity.groups],
        "num_thresholds": plan.num_thresholds,
        "prune_start_step": schedule.start_step,
        "prune_end_step": schedule.end_step,
        "every_steps": schedule.every_steps,
        "num_events": schedule.num_events,
        "compute_share_at_start": schedule.start_step / schedule.dense_equivalent_steps(plan.num_steps),
        "compute_share_at_end": schedule.dense_equivalent_steps(max(1, schedule.end_step))
        / schedule.dense_equivalent_steps(plan.num_steps),
    }


def _rate(config: Config, plan: RunPlan) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "kind": trainer.lr_scheduler_type,
        "warmup_steps": warmup_length(trainer, plan.num_steps),
        "decay_start_step": decay_start(trainer, plan.num_steps),
    }


def _memory(memory: GpuMemory) -> dict[str, Any]:
    return {
        "weights_bytes": memory.weights,
        "gradients_bytes": memory.gradients,
        "waiting_gradients_bytes": memory.waiting_gradients,
        "moments_bytes": memory.moments,
        "masks_bytes": memory.masks,
        "activations_bytes": memory.activations,
        "largest_transient_bytes": memory.transient,
        "peak_bytes": memory.peak,
        "peak_phase": memory.peak_phase,
    }


def _leanest(config: Config, setting: Setting) -> Setting:
    """Return the setting in which the largest micro-batch fits: with `auto`, it frees gathered weights."""
    return replace(setting, reshard_after_forward=config.launch.reshard_after_forward != "false")


def _host(memory: HostMemory) -> dict[str, Any]:
    return {
        "layer_bytes": memory.layer,
        "shard_bytes": memory.shard,
        "start_bytes_on_cpus": memory.shard + memory.layer,
        "export_bytes_of_rank_0": memory.export,
    }


def _largest_fit(plan: RunPlan, num_prunable: int, setting: Setting, request: PlanConfig) -> dict[str, Any]:
    """Return the largest micro-batch that fits in the device's memory minus its headroom; sizes are None if none fits."""
    device = parse_bytes(memory_of(request))
    share = plan.batch_size // plan.world_size
    budget = device * (1 - request.memory_headroom)
    fit = largest_micro_batch(plan.model, num_prunable, setting, share=share, budget_bytes=budget)
    found: dict[str, Any] = {"device_memory_bytes": device, "memory_headroom": request.memory_headroom}
    if fit is None:
        one = gpu_memory(plan.model, num_prunable, replace(setting, micro_batch_size=1, accumulates=share > 1))
        return {**found, "micro_batch_size": None, "gradient_accumulation_steps": None, "peak_bytes": one.peak}
    size, memory = fit
    return {
        **found,
        "micro_batch_size": size,
        "gradient_accumulation_steps": share // size,
        "peak_bytes": memory.peak,
    }
