"""An evaluation's figures for a person."""

from __future__ import annotations

from typing import Any

from train.report.table import count_text, half_up, percent_text


def figures_text(figures: dict[str, Any]) -> str:
    zeros, weights = figures["zero_linear_params"], figures["linear_params"]
    density = f"{zeros:,} of {weights:,} linear weights are zero ({percent_text(zeros / weights)})"
    return "\n".join(
        [
            f"{figures['model']} on held-out {figures['data']}: {count_text(figures['num_tokens'])} tokens, "
            f"{count_text(figures['num_bytes'])} bytes, {figures['dtype']}",
            f"  perplexity     {half_up(figures['perplexity'], 3)} a token, in {figures['num_windows']} disjoint windows of "
            f"{figures['window']} tokens",
            f"  bits per byte  {half_up(figures['bits_per_byte'], 4)} (unigram model of the same tokens: "
            f"{half_up(figures['unigram_bits_per_byte'], 4)})",
            f"  {density if zeros else 'dense: ' + density}",
        ]
    )
