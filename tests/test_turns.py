"""Two loops that take turns in one process: their order, and their device."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.benchmarks.turns import Turns, run_in_turns


@pytest.mark.timeout(60)
def test_each_thread_takes_the_ranks_device_because_a_new_thread_starts_with_device_0(monkeypatch):
    chosen: dict[int, int] = {}
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.update({threading.get_ident(): device}))
    torch.cuda.set_device(3)

    def body() -> None:
        seen.append((torch.cuda.current_device(), threading.get_ident() == main))

    main = threading.get_ident()
    run_in_turns([body, body], Turns())
    assert seen == [(3, False), (3, False)]


@pytest.mark.timeout(60)
def test_two_loops_take_a_step_each_until_one_has_no_more():
    turns, order = Turns(), []

    def loop(mine: int, steps: int) -> None:
        for step in range(steps):
            turns.wait(mine)
            order.append((mine, step))
            turns.hand_over(mine)

    run_in_turns([lambda: loop(0, 2), lambda: loop(1, 3)], turns)
    assert order == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)]
