"""The table of finished runs: the columns of the published series' model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsity.common.text import count_text, half_up, markdown_table, percent_text, power_text

COLUMNS = {
    "model": "Model",
    "total_params": "Total Params",
    "linear_params": "Linear Params",
    "avg_linear_params": "Avg Linear Params",
    "nonzero_linear": "Non-Zero Linear",
    "sparsity": "Sparsity",
    "batch_tokens": "Batch Size",
    "lr": "LR",
    "total_tokens": "Total Tokens",
    "final_train_loss": "Final Train Loss",
    "perplexity": "Perplexity",
}


def cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return one run's cells from its summary; the cell of a figure that was not measured is empty."""
    loss: Any = figures.get("final_train_loss")
    spread: Any = figures.get("final_train_loss_std")
    perplexity = figures.get("perplexity")
    return {
        "model": str(figures["run_name"]),
        "total_params": count_text(figures["total_params"]),
        "linear_params": count_text(figures["linear_params"]),
        "avg_linear_params": count_text(figures["avg_linear_params"]),
        "nonzero_linear": count_text(figures["nonzero_linear_params"]),
        "sparsity": percent_text(figures["sparsity"]),
        "batch_tokens": count_text(figures["batch_tokens"], 1),
        "lr": power_text(figures["learning_rate"]),
        "total_tokens": count_text(figures["total_tokens"], 1),
        "final_train_loss": "" if loss is None else f"{half_up(loss, 3)} ± {half_up(spread, 3)}",
        "perplexity": "" if perplexity is None else half_up(perplexity, 2),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as an aligned Markdown table."""
    lines = map(cells, rows)
    return markdown_table(list(COLUMNS.values()), [[line[column] for column in COLUMNS] for line in lines])
