"""Checks that a set of runs can identify the coefficients of the law at all, whatever the losses are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.runs.law.law import COEFFICIENTS, FORMULAS, Form
from eval.runs.law.lbfgs import Array
from sparsity.common.text import count_text

LEVEL = 0.05
"""Sizes, or token counts, count as one level if they differ by less than this relative difference."""
SAME_TOKENS = 0.01
"""The largest relative spread of token counts for the forms without D."""
MIN_LEVELS = 3
"""The different values of N that E, A and alpha need, and the different values of D that E, B and beta need."""


def check_points(params: Array, tokens: Array, form: Form, spare: int = 1) -> None:
    """Check that runs with these N and D can identify the law, and have `spare` runs more than coefficients.

    Raises:
        ValueError: The runs cannot; the message says which runs to add.
    """
    sizes, amounts = levels(params), levels(tokens)
    needed, law = len(COEFFICIENTS[form]) + spare, FORMULAS[form]
    if form != "nd" and tokens.max() > (1 + SAME_TOKENS) * tokens.min():
        raise ValueError(
            f"form={form} is for runs on equally many tokens, and these have {_span(tokens)}: fit form=nd, or give the runs "
            "of one token count."
        )
    reduced = " or fit form=n, which needs no second token count" if form == "nd" and amounts.max() == 0 else ""
    num_different = len(np.unique(np.stack([sizes, amounts] if form == "nd" else [sizes]), axis=1).T)
    least_sizes = MIN_LEVELS if form != "power" else 2
    if sizes.max() + 1 < least_sizes:
        raise ValueError(
            f"{law} needs runs of at least {least_sizes} sizes N more than {LEVEL:.0%} apart, and these have "
            f"{_values(params, sizes)}: add runs of other sizes."
        )
    if form == "nd" and amounts.max() + 1 < MIN_LEVELS:
        raise ValueError(
            f"{law} needs runs on at least {MIN_LEVELS} token counts D more than {LEVEL:.0%} apart, and these have "
            f"{_values(tokens, amounts)}: add runs on other token counts{',' if reduced else ''}{reduced}."
        )
    if num_different < needed:
        of = "sizes and token counts" if form == "nd" else "sizes"
        raise ValueError(
            f"{law} has {len(COEFFICIENTS[form])} coefficients and needs at least {needed} runs of different {of}, and "
            f"these have {num_different}: add runs, seeds do not count."
        )
    if form == "nd" and _on_a_line(params, tokens):
        raise ValueError(
            f"in these runs D follows from N (log D = constant {_slope(params, tokens):+.2f} log N, within {LEVEL:.0%}), so "
            f"that {law} cannot separate their effects: add runs of the same size on other token counts, or fit form=n or "
            "form=power, which describe these runs by N alone."
        )


def levels(values: Array) -> NDArray[np.intp]:
    """Return the number of each value's level, from 0: a level holds the values up to `LEVEL` above its smallest."""
    number, start, level = np.zeros(len(values), dtype=np.intp), -np.inf, -1
    for index in np.argsort(values):
        if values[index] > (1 + LEVEL) * start or level < 0:
            start, level = values[index], level + 1
        number[index] = level
    return number


def tokens_follow(params: Array, tokens: Array) -> bool:
    """Return whether token counts differ between runs but follow from the sizes: log D is a line in log N."""
    return bool(tokens.max() > (1 + SAME_TOKENS) * tokens.min()) and _on_a_line(params, tokens)


def _on_a_line(params: Array, tokens: Array) -> bool:
    logs = np.log(np.stack([params, tokens]))
    # The smallest standard deviation over all directions is that of the distances from the best line.
    return bool(np.sqrt(np.linalg.eigvalsh(np.cov(logs, bias=True))[0]) < LEVEL)


def _slope(params: Array, tokens: Array) -> float:
    return float(np.polyfit(np.log(params), np.log(tokens), 1)[0])


def _span(values: Array) -> str:
    return f"{count_text(values.min())} to {count_text(values.max())}"


def _values(values: Array, numbers: NDArray[np.intp]) -> str:
    return "only " + " and ".join(count_text(values[numbers == level].mean()) for level in range(numbers.max() + 1))
