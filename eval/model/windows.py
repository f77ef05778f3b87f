"""Windows of each convention of perplexity: the tokens that are read together, and those that are scored."""

from __future__ import annotations

from collections.abc import Sequence

from train.scoring import Window


def strided_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Return windows of `window` tokens, each `stride` after the last.

    Every token but the first is scored once, after all tokens of its window before it; these are at least `window` -
    `stride` except at the start.
    """
    windows, scored = [], 1
    for start in range(0, num_tokens, stride):
        stop = min(start + window, num_tokens)
        if scored < stop:
            windows.append(Window(start, stop, scored))
        scored = stop
        if stop == num_tokens:
            break
    return windows


def rolling_windows(lengths: Sequence[int], context: int) -> list[Window]:
    """Return lm-evaluation-harness's windows over documents.

    The documents follow one another, each `lengths[i]` tokens with the prefix token in front. Windows are disjoint,
    with `context` inputs; the last of a document reaches back to be as long as the others.
    """
    windows, begin = [], 0
    for length in lengths:
        for scored in range(1, length, context):
            stop = min(scored + context, length)
            start = max(0, stop - 1 - context) if scored > 1 else 0
            windows.append(Window(begin + start, begin + stop, begin + scored))
        begin += length
    return windows
