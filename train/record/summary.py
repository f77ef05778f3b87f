"""summary.json: a finished run's figures, in the terms of the series' table."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import Config
from sparsity.prunable import own_linear_weights
from sparsity.shards import local_values, rank_layout
from train.plan.choices import choice_words
from train.plan.run import RunPlan
from train.scoring import Score

SHARE_OF_FINAL_STEPS = 0.01


def final_loss(step_losses: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation of the training loss over the last 1 % of the steps, at least 2."""
    step_losses = step_losses[step_losses.isfinite()]
    num_final = min(len(step_losses), max(2, round(SHARE_OF_FINAL_STEPS * len(step_losses))))
    final = step_losses[-num_final:].double()
    return float(final.mean()), float(final.std(correction=0))


@torch.no_grad()
def count_nonzero_linear(model: nn.Module) -> int:
    """Weights of the linear layers that are not exactly 0, over all shards. Collective over the shard group."""
    weights = list(own_linear_weights(model).values())
    counts = torch.stack([torch.count_nonzero(local_values(weight)) for weight in weights])
    return int(rank_layout(weights).sum_counts(counts).sum())


def eval_overrides(config: Config, plan: RunPlan) -> dict[str, Any]:
    """What `python -m eval` has to be told, beside model and data, to score the same text in the same windows."""
    usual = {
        "path": None,
        "subset": None,
        "text_field": "text",
        "heldout_share": 0.01,
        "max_documents": None,
        "bos": False,
        "eos": True,
        "max_document_tokens": None,
        "attention": "causal",
        "cache_dir": os.environ.get("SPARSELLM_CACHE", "~/.cache/sparsellm"),
    }
    own = {key: getattr(config.data, key) for key in usual}
    overrides = {f"data.{key}": value for key, value in own.items() if value != usual[key]}
    if plan.sequence_length != plan.model.max_position_embeddings:
        overrides["window"] = plan.sequence_length
    return overrides


def summarize(
    config: Config,
    plan: RunPlan,
    *,
    step_losses: Tensor,
    nonzero_linear_params: int,
    num_prunable: int,
    average_density: float,
    score: Score,
    heldout_bytes: int,
    unigram_bits_per_byte: float,
    fsdp_version: int,
    train_seconds: float,
    seconds: float,
) -> dict[str, Any]:
    """All figures of a finished run. Counts are parameters, tokens, steps; losses are nats per token.

    `average_density` is that of the `num_prunable` weights; the summary's is that of all linear weights.
    """
    loss, spread = final_loss(step_losses)
    linear = plan.counts.linear
    average_linear = linear - (1 - average_density) * num_prunable
    schedule = plan.schedule
    return {
        "run_name": plan.run_dir.name,
        "model": plan.model.name,
        "data": config.data.source,
        "choices": choice_words(config, prunes=schedule is not None),
        "eval_overrides": eval_overrides(config, plan),
        "world_size": plan.world_size,
        "fsdp_version": fsdp_version,
        "total_params": plan.counts.total,
        "linear_params": linear,
        "nonzero_linear_params": nonzero_linear_params,
        "sparsity": 1 - nonzero_linear_params / linear,
        "target_sparsity": schedule.sparsity if schedule else 0.0,
        "average_density": average_linear / linear,
        "avg_linear_params": average_linear,
        "steps": len(step_losses),
        "batch_tokens": plan.batch_tokens,
        "total_tokens": plan.total_tokens,
        "learning_rate": config.trainer.learning_rate,
        "final_train_loss": loss,
        "final_train_loss_std": spread,
        "heldout_loss": score.loss,
        "perplexity": score.perplexity,
        "perplexity_window": score.window,
        "bits_per_byte": score.bits_per_byte(heldout_bytes),
        "unigram_bits_per_byte": unigram_bits_per_byte,
        "heldout_tokens": score.num_tokens,
        "heldout_bytes": heldout_bytes,
        "prune_start_step": schedule.start_step if schedule else None,
        "prune_end_step": schedule.end_step if schedule else None,
        "prune_every_steps": schedule.every_steps if schedule else None,
        "tokens_per_second": plan.total_tokens / train_seconds,
        "train_seconds": train_seconds,
        "seconds": seconds,
    }
