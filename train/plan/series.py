"""One run as a line of the series' table: the columns of the published model cards, computed from its configuration."""

from __future__ import annotations

from typing import Any

from conf.schema import Config
from sparsity.common.text import count_text, half_up, percent_text, power_text
from sparsity.staircase import Staircase
from train.plan.run import RunPlan

COLUMNS = (
    "model",
    "total_params",
    "linear_params",
    "avg_linear_params",
    "nonzero_linear",
    "sparsity",
    "batch_tokens",
    "lr",
    "total_tokens",
    "final_train_loss",
    "final_train_loss_std",
    "perplexity",
)
MEBI = 1 << 20


def table_row(config: Config, plan: RunPlan) -> dict[str, Any]:
    """Return a run's line of the table, with exact numbers, and None for figures that only training can give.

    `batch_tokens` and `total_tokens` follow the model cards of the published series, which call 2^20 tokens a million;
    the exact numbers are in the keys with `_true`.
    """
    linear = plan.counts.linear
    prunable, pruned = plan.num_prunable, plan.num_pruned
    batch_tokens = card_batch_tokens(plan.batch_tokens)
    return {
        "model": plan.run_dir.name,
        "total_params": plan.counts.total,
        "linear_params": linear,
        "avg_linear_params": linear - (1 - plan.average_density) * prunable,
        "nonzero_linear": linear - pruned,
        "sparsity": plan.schedule.sparsity if plan.schedule and prunable == linear else pruned / linear,
        "batch_tokens": batch_tokens,
        "lr": config.trainer.learning_rate,
        "total_tokens": plan.num_steps * batch_tokens,
        "final_train_loss": None,
        "final_train_loss_std": None,
        "perplexity": None,
        "batch_tokens_true": plan.batch_tokens,
        "total_tokens_true": plan.total_tokens,
        "average_density": plan.average_density,
        "average_density_card": card_average_density(plan.schedule, plan.num_steps) if plan.schedule else 1.0,
        "dense_equivalent_steps": plan.average_density * plan.num_steps,
        "recipe": config.recipe,
    }


def card_batch_tokens(batch_tokens: int) -> int:
    """Return the batch as the cards count it, 8M for 4096 x 2048: if 2^20 divides the batch, 2^20 tokens count as 1e6."""
    return batch_tokens // MEBI * 1_000_000 if batch_tokens % MEBI == 0 else batch_tokens


def card_average_density(schedule: Staircase, num_steps: int) -> float:
    """Return the average density as the cards calculate it, for a run that is one interval longer than the real one.

    The cards count an interval of `every` steps for each prune event and do not shorten the rest of the run after the
    window, so they divide by steps + every. They have 0.8919, 0.7650, 0.6083 and 0.3984; the means over the actual steps
    are 0.8928, 0.7660, 0.6096 and 0.3992.
    """
    every = schedule.every_steps
    window = every * sum(schedule.density_after(event) for event in range(schedule.num_events))
    tail = (num_steps - schedule.end_step) * (1 - schedule.sparsity)
    return (schedule.start_step + window + tail) / (num_steps + every)


def card_cells(row: dict[str, Any]) -> dict[str, str]:
    """Return the row as the cards print it, rounded half-up: two decimals for parameters and percentages, one for tokens."""
    params = ("total_params", "linear_params", "avg_linear_params", "nonzero_linear")
    cells = {key: count_text(row[key]) for key in params}
    cells["model"] = row["model"]
    cells["sparsity"] = percent_text(row["sparsity"])
    cells["batch_tokens"] = count_text(row["batch_tokens"], 1, trim=True)
    cells["lr"] = power_text(row["lr"])
    cells["total_tokens"] = count_text(row["total_tokens"], 1)
    for key, places in (("final_train_loss", 3), ("final_train_loss_std", 3), ("perplexity", 2)):
        cells[key] = "" if row[key] is None else half_up(row[key], places)
    return {column: cells[column] for column in COLUMNS}
