"""summary.json: the figures of a finished run, named as in the series' table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from torch import Tensor, nn

from conf.schema import Config
from conf.schema.data import SourceConfig
from sparsity.prunable import own_linear_weights
from sparsity.shards import local_values, rank_layout
from train.plan.choices import choice_words
from train.plan.run import RunPlan
from train.scoring import Score

SHARE_OF_FINAL_STEPS = 0.01


def final_loss(step_losses: Tensor) -> tuple[float, float]:
    """Return mean and population standard deviation of the training loss over the last 1 % of the steps, at least two."""
    step_losses = step_losses[step_losses.isfinite()]
    num_final = min(len(step_losses), max(2, round(SHARE_OF_FINAL_STEPS * len(step_losses))))
    final = step_losses[-num_final:].double()
    return float(final.mean()), float(final.std(correction=0))


@torch.no_grad()
def count_nonzero_linear(model: nn.Module) -> int:
    """Count the non-zero weights of the linear layers, over all shards.

    Collective: the ranks that share the model's shards call it.
    """
    weights = list(own_linear_weights(model).values())
    counts = torch.stack([torch.count_nonzero(local_values(weight)) for weight in weights])
    return int(rank_layout(weights).sum_counts(counts).sum())


def eval_overrides(config: Config, plan: RunPlan) -> dict[str, Any]:
    """Return the overrides with which `python -m eval` scores the same text in the same windows."""
    usual = {
        "path": None,
        "name": None,
        "subset": None,
        "split": "train",
        "stream": False,
        "token_dtype": None,
        "on_error": "raise",
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
    if config.data.sources:
        overrides["data.sources"] = sources_text(config.data.sources)
    if plan.sequence_length != plan.model.max_position_embeddings:
        overrides["window"] = plan.sequence_length
    return overrides


def sources_text(sources: Sequence[SourceConfig]) -> str:
    """Return a mixture's sources in the form of an override."""
    usual = asdict(SourceConfig(path="x"))
    texts = []
    for source in sources:
        own = {key: value for key, value in asdict(source).items() if value is not None and value != usual[key]}
        texts.append(
            ",".join(f"{key}:{QuotedString(value, Quote.single).with_quotes() if isinstance(value, str) else value}"
                     for key, value in own.items())
        )  # fmt: skip
    return "[" + ",".join("{" + text + "}" for text in texts) + "]"


def summarize(
    config: Config,
    plan: RunPlan,
    *,
    step_losses: Tensor,
    nonzero_linear_params: int,
    num_prunable: int,
    average_density: float,
    score: Score,
    others: dict[str, float],
    heldout_bytes: int,
    by_source: dict[str, Any],
    unigram_bits_per_byte: float,
    fsdp_version: int,
    train_seconds: float,
    seconds: float,
) -> dict[str, Any]:
    """Return all figures of a finished run. Losses are in nats per token.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        step_losses: The training loss of each step.
        nonzero_linear_params: The number of linear weights that are not 0.
        num_prunable: The number of weights that may be pruned.
        average_density: The average density of the prunable weights; the summary has that of all linear weights.
        score: The held-out score.
        others: The figures of the other held-out sets and of the tasks.
        heldout_bytes: The UTF-8 bytes of the held-out text.
        by_source: The tokens and epochs of each source of a mixture.
        unigram_bits_per_byte: The bits per byte if tokens are guessed by frequency.
        fsdp_version: 2 under FSDP2, 0 without sharding.
        train_seconds: The seconds of training.
        seconds: The seconds of the whole run.
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
        **{
            f"{kind}_by_source": {
                name[len(kind) + 1 :]: value for name, value in by_source.items() if name.startswith(kind)
            }
            for kind in ("tokens", "epochs")
            if by_source
        },
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
        **({"eval": others} if others else {}),
        "prune_start_step": schedule.start_step if schedule else None,
        "prune_end_step": schedule.end_step if schedule else None,
        "prune_every_steps": schedule.every_steps if schedule else None,
        "tokens_per_second": plan.total_tokens / train_seconds,
        "train_seconds": train_seconds,
        "seconds": seconds,
    }
