"""The series' table: its columns, and numbers written as its cards write them, rounded half-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

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


def half_up(value: float, digits: int) -> str:
    """`value` with `digits` decimals; a half goes up, as in the cards."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e15:
        return f"{value:.{digits}e}"
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP))


def count_text(count: float, digits: int = 2) -> str:
    """A number of parameters or tokens with a unit: 1.20B, 0.23B, 57.94M, 12.3K."""
    for unit, size, least in (("B", 1e9, 1e8), ("M", 1e6, 1e6), ("K", 1e3, 1e3)):
        if count >= least:
            return half_up(count / size, digits) + unit
    return str(round(count))


def rate_text(rate: float) -> str:
    """A learning rate as the cards write it: 3e-4."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{Decimal(mantissa).normalize():f}e{int(exponent)}"


def percent_text(share: float) -> str:
    return half_up(100 * share, 2) + "%"


def cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """One run's cells from its summary's figures; what was not measured stays empty."""
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
        "lr": rate_text(figures["learning_rate"]),
        "total_tokens": count_text(figures["total_tokens"], 1),
        "final_train_loss": "" if loss is None else f"{half_up(loss, 3)} ± {half_up(spread, 3)}",
        "perplexity": "" if perplexity is None else half_up(perplexity, 2),
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as an aligned Markdown table."""
    table = [list(COLUMNS.values()), *[[row[column] for column in COLUMNS] for row in map(cells, rows)]]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
