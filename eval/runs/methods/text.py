"""Ways to prune as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from eval.runs.methods.comparison import Entry
from eval.runs.trials import spread_text
from sparsity.common.text import count_text, half_up, markdown_table

HEAD = ("Method", "Seeds", "N-bar", "Final", "FLOPs", "of dense", "Loss", "Bits per byte", "Gap to dense")


def cells(entry: Entry) -> list[str]:
    """Return the table's row of a method."""
    average, dense = entry.flops_average, entry.flops_dense
    return [
        entry.name,
        str(entry.loss.num),
        count_text(entry.avg_linear_params),
        count_text(entry.final_linear_params),
        "" if average is None else flops_text(average),
        "" if average is None or dense is None else half_up(average / dense, 2),
        spread_text(entry.loss),
        spread_text(entry.bits_per_byte),
        "" if entry.dense_gap is None else spread_text(entry.dense_gap, sign=True),
    ]


def flops_text(flops: float) -> str:
    """Return FLOPs with three digits, 1.23e15."""
    mantissa, exponent = f"{flops:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def markdown(entries: Sequence[Entry]) -> str:
    """Return an aligned Markdown table, and what its columns mean."""
    return "\n".join(
        [
            markdown_table(HEAD, [cells(entry) for entry in entries]),
            "",
            "Held-out nats a token, mean ± sample standard deviation over seeds, the lowest first; the gap to dense is the "
            "mean of each seed's difference. N-bar: linear weights active in the forward pass, averaged over the steps; Final: "
            "those that are not zero at the end. FLOPs: training FLOPs of active weights, with the dense gradients that a "
            "method needs; of dense: their share of what hardware for dense matrices computes.",
        ]
    )


def as_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the table as JSON values, one dict for each method."""
    return [asdict(entry) for entry in entries]
