"""Work is spread over processes, results come in order, and the first error stops all processes."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest

from train.data.pool import parallel


def _square_slowly_at_the_front(value: int) -> int:
    time.sleep(0.2 if value == 0 else 0)
    return value * value


def _refuse_two_and_sleep_otherwise(value: int) -> None:
    if value == 2:
        raise ValueError("two is refused: give another.")
    time.sleep(60)


def _die(_: int) -> None:
    os._exit(9)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_items(num_workers: int) -> None:
    items = list(range(6))
    assert parallel(_square_slowly_at_the_front, items, label="squares", num_workers=num_workers) == [
        0,
        1,
        4,
        9,
        16,
        25,
    ]


def test_no_items_are_no_work() -> None:
    assert parallel(_die, [], label="nothing") == []


def test_the_first_error_stops_the_others_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^two is refused: give another\.$"):
        parallel(_refuse_two_and_sleep_otherwise, [1, 2], label="sleep", num_workers=2)
    assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_a_sentence_not_a_hang() -> None:
    with pytest.raises(ValueError, match=r"die: a worker process was killed, .*: lower data\.num_workers=2"):
        parallel(_die, [1, 2], label="die", num_workers=2)


def test_away_from_a_terminal_a_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parallel(_square_slowly_at_the_front, [1, 2], label="squares", num_workers=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "squares: 0.0 s\n"
