"""The windows of each convention of perplexity: which tokens are read together, and which of them are scored."""

from __future__ import annotations

from collections.abc import Sequence

from train.scoring import Window


def strided_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Return windows of `window` tokens, each beginning `stride` tokens after the previous one.

    Every token but the first is scored once. Except at the start of the text, it is predicted from at least
    `window` - `stride` earlier tokens.
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

    Documents follow one another in the token array; document i has `lengths[i]` tokens including its prefix token. Windows
    have `context` inputs and score disjoint tokens. The last window of a document starts earlier, so that it is as long as
    the others.
    """
    windows, begin = [], 0
    for length in lengths:
        for scored in range(1, length, context):
            stop = min(scored + context, length)
            start = max(0, stop - 1 - context) if scored > 1 else 0
            windows.append(Window(begin + start, begin + stop, begin + scored))
        begin += length
    return windows
