"""The tokens that each convention reads and scores, compared with its authors' description."""

from __future__ import annotations

import pytest

from eval.model.windows import rolling_windows, strided_windows
from train.scoring import Window, disjoint_windows


def scored(windows: list[Window]) -> list[int]:
    return [token for window in windows for token in range(window.first, window.stop)]


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 10, 16, 17, 31])
def test_every_token_but_the_first_is_scored_once(num_tokens):
    assert scored(disjoint_windows(num_tokens, 8)) == list(range(1, num_tokens))
    for stride in (1, 2, 3, 7):
        assert scored(strided_windows(num_tokens, 8, stride)) == list(range(1, num_tokens))


def test_strided_windows_move_on_and_score_what_is_new():
    assert strided_windows(13, 8, 2) == [
        Window(0, 8, 1), Window(2, 10, 8), Window(4, 12, 10), Window(6, 13, 12),
    ]  # fmt: skip


def test_rolling_windows_are_disjoint_but_for_the_last_which_is_full():
    # Eleven tokens after a prefix, four at a time: 4, 4, and 3 with one more token as context.
    assert rolling_windows([12], 4) == [Window(0, 5, 1), Window(4, 9, 5), Window(7, 12, 9)]
    assert [window.num_inputs for window in rolling_windows([12], 4)] == [4, 4, 4]


def test_rolling_windows_start_anew_with_each_document():
    assert rolling_windows([3, 6], 4) == [Window(0, 3, 1), Window(3, 8, 4), Window(4, 9, 8)]


def test_a_document_as_long_as_the_context_is_one_window():
    assert rolling_windows([5], 4) == [Window(0, 5, 1)]
    assert rolling_windows([1], 4) == []


@pytest.mark.cluster
@pytest.mark.parametrize("length", range(1, 30))
def test_rolling_windows_equal_the_harness_own(length):
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed: pip install '.[eval]'")
    tokens = list(range(1, length))
    theirs = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=7, context_len=1)
    ]
    text = [0, *tokens]
    ours = [
        (text[window.start : window.stop - 1], text[window.first : window.stop])
        for window in rolling_windows([length], 7)
    ]
    assert ours == [(context + continuation[:-1], continuation) for context, continuation in theirs]
