"""The comparison of sparse runs with their dense twins, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.runs.pairs.comparison import Comparison, Spread
from sparsity.common.text import count_text, half_up, markdown_table

HEAD = (
    "Sparse run", "Seeds", "N-bar", "Final", "Loss", "Bits per byte", "Twin", "Twin's loss", "Gap to twin",
    "Gap to dense curve",
)  # fmt: skip


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as text, such as target=0.8, window.start=0."""
    return ", ".join(f"{name.removeprefix('sparsity.')}={value}" for name, value in settings.items()) or "the run"


def usual_settings(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the most frequent value of each key but the first; {} if the configurations differ in one key only."""
    names = list(comparisons[0].settings)[1:]
    usual = {}
    for name in names:
        values = [comparison.settings[name] for comparison in comparisons]
        usual[name] = max(values, key=values.count)
    return usual


def label(comparison: Comparison, usual: Mapping[str, Any]) -> str:
    """Return a configuration's settings as text, without those that have their usual value."""
    own = comparison.settings.items()
    return settings_text({name: value for name, value in own if name not in usual or value != usual[name]})


def cells(comparison: Comparison, usual: Mapping[str, Any]) -> list[str]:
    twin, gap = comparison.twin_loss, comparison.curve_gap
    return [
        label(comparison, usual),
        str(comparison.loss.num),
        count_text(comparison.avg_linear_params),
        count_text(comparison.final_linear_params),
        spread_text(comparison.loss),
        spread_text(comparison.bits_per_byte),
        "" if comparison.twin_linear_params is None else count_text(comparison.twin_linear_params),
        "" if twin is None else spread_text(twin),
        "" if comparison.twin_gap is None else spread_text(comparison.twin_gap, sign=True),
        "" if gap is None else f"{'+' if gap >= 0 else ''}{half_up(gap, 4)}",
    ]


def spread_text(spread: Spread, sign: bool = False) -> str:
    plus = "+" if sign and spread.mean >= 0 else ""
    deviation = "" if spread.std is None else f" ± {half_up(spread.std, 4)}"
    return f"{plus}{half_up(spread.mean, 4)}{deviation}"


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return an aligned Markdown table and an explanation of its columns."""
    usual = usual_settings(comparisons)
    return "\n".join(
        [
            markdown_table(HEAD, [cells(comparison, usual) for comparison in comparisons]),
            "",
            "Held-out nats a token, mean ± sample standard deviation over seeds. A gap is sparse less dense: above 0 the "
            "sparse run is worse. To the twin it is the mean of each seed's difference; to the curve of the dense runs it is "
            "taken at N-bar." + (f" Where a name says nothing else: {settings_text(usual)}." if usual else ""),
        ]
    )


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [{**asdict(comparison), "curve_gap": comparison.curve_gap} for comparison in comparisons]
