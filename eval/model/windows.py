"""Which tokens are read together and which are scored: the windows behind each convention of perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from train.scoring import Window


def strided_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Windows of `window` tokens that move on by `stride`: every token but the first is scored once, behind all tokens
    of its window before it, at least `window` - `stride` of them except at the start."""
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
    """lm-evaluation-harness's windows over documents that lie one behind the other, each `lengths[i]` tokens with the one
    in front that stands for nothing before: disjoint ones of `context` inputs, the last of a document reaching back to
    be as long as the others."""
    windows, begin = [], 0
    for length in lengths:
        for scored in range(1, length, context):
            stop = min(scored + context, length)
            start = max(0, stop - 1 - context) if scored > 1 else 0
            windows.append(Window(begin + start, begin + stop, begin + scored))
        begin += length
    return windows
