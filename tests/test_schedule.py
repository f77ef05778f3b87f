"""The schedule equals an independent calculation: a loop over the steps."""

import math

import pytest

from sparsity.schedule import Geometric
from sparsity.window import compute_window, schedule_of_window

SERIES = [  # sparsity, start, end, every, steps, average density, dense-equivalent steps
    (0.2, 2500, 8100, 100, 11200, 0.8928, 9998.8),
    (0.4, 2500, 8875, 75, 13050, 0.7660, 9995.7),
    (0.6, 2500, 10100, 100, 16375, 0.6096, 9982.1),
    (0.8, 2500, 12600, 100, 25050, 0.3992, 10000.2),
]


def density_by_hand(sparsity: float, start: int, end: int, every: int, num_steps: int) -> list[float]:
    """Return the density after a loop over the steps, in which each event removes another equal share."""
    events = [step for step in range(num_steps) if start <= step <= end and (step - start) % every == 0]
    densities, passed = [], 0
    for step in range(num_steps):
        passed += step in events
        densities.append((1 - sparsity) ** (passed / len(events)))
    return densities


@pytest.mark.parametrize(("sparsity", "start", "end", "every", "steps", "average", "dense_steps"), SERIES)
def test_schedule_equals_a_walk_through_the_steps(sparsity, start, end, every, steps, average, dense_steps):
    schedule = Geometric(sparsity=sparsity, start_step=start, end_step=end, every_steps=every)
    by_hand = density_by_hand(sparsity, start, end, every, steps)
    assert all(math.isclose(schedule.density(step), by_hand[step], rel_tol=1e-12) for step in range(steps))
    assert round(schedule.average_density(steps), 4) == average
    assert round(schedule.dense_equivalent_steps(steps), 1) == dense_steps
    assert math.isclose(schedule.average_density(steps), math.fsum(by_hand) / steps, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("sparsity", "start", "end", "every", "steps"),
    [(0.8, 0, 0, 1, 1), (0.8, 3, 3, 5, 9), (0.5, 0, 6, 2, 7), (0.0, 2, 8, 3, 10), (0.99, 1, 12, 11, 40)],
)
def test_schedule_holds_at_the_edges(sparsity, start, end, every, steps):
    schedule = Geometric(sparsity, start, end, every)
    by_hand = density_by_hand(sparsity, start, end, every, steps)
    assert [schedule.density(step) for step in range(steps)] == pytest.approx(by_hand, rel=1e-12)
    assert schedule.average_density(steps) == pytest.approx(sum(by_hand) / steps, rel=1e-12)
    assert list(schedule.events()) == list(range(start, end + 1, every))
    assert schedule.density(end) == 1 - sparsity


def test_average_density_of_a_run_cut_short_counts_only_its_steps():
    schedule = Geometric(0.8, 10, 50, 10)
    by_hand = density_by_hand(0.8, 10, 50, 10, 100)
    for steps in (1, 10, 11, 25, 50, 51, 100):
        assert schedule.average_density(steps) == pytest.approx(sum(by_hand[:steps]) / steps, rel=1e-12)


@pytest.mark.parametrize(("sparsity", "start", "end", "every", "steps", "_average", "_dense"), SERIES)
def test_compute_window_lands_on_the_cards_steps(sparsity, start, end, every, steps, _average, _dense):
    schedule, num_steps = compute_window(sparsity, 0.25, 0.75, budget=10_000, every_steps=100)
    assert schedule.start_step == start
    assert abs(schedule.end_step - end) <= 100
    assert abs(num_steps - steps) <= 100
    same, _ = compute_window(sparsity, 0.25, 0.75, num_steps=steps, every_steps=100)
    assert (same.start_step, same.end_step) == (schedule.start_step, schedule.end_step)


@pytest.mark.parametrize("steps", [16, 24, 40, 100, 240, 1000, 30000])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8, 0.95])
def test_compute_shares_hold_to_within_an_interval(steps, sparsity):
    schedule, _ = compute_window(sparsity, 0.25, 0.75, num_steps=steps)
    total = schedule.dense_equivalent_steps(steps)
    assert abs(schedule.start_step / total - 0.25) * total <= schedule.every_steps
    assert abs(schedule.dense_equivalent_steps(max(1, schedule.end_step)) - 0.75 * total) <= 2 * schedule.every_steps
    schedule.check_fits(steps)
    if steps >= 40:
        assert schedule.num_events >= 8


@pytest.mark.parametrize("steps", range(1, 16))
def test_the_shortest_runs_still_have_a_window_inside_them(steps):
    schedule, _ = compute_window(0.8, 0.25, 0.75, num_steps=steps)
    schedule.check_fits(steps)
    assert schedule.density(steps - 1) == pytest.approx(0.2)


def test_a_window_means_the_same_in_steps_tokens_and_auto():
    common = {"every_steps": 10, "num_steps": 200, "batch_tokens": 512}
    expected = Geometric(0.8, 50, 100, 10)
    assert schedule_of_window(0.8, 50, 100, of="steps", **common) == expected
    assert schedule_of_window(0.8, 50, 100, of="auto", **common) == expected
    assert schedule_of_window(0.8, 50 * 512, 100 * 512, of="tokens", **common) == expected
    by_share = schedule_of_window(0.8, 0.25, 0.75, of="auto", **common)
    assert by_share == compute_window(0.8, 0.25, 0.75, num_steps=200, every_steps=10)[0]


BAD_SCHEDULES = [
    ((1.0, 0, 10, 5), "sparsity=1.0 is outside"),
    ((-0.1, 0, 10, 5), "sparsity=-0.1 is outside"),
    ((float("nan"), 0, 10, 5), "sparsity=nan is outside"),
    ((0.5, 10, 0, 5), "reversed"),
    ((0.5, 0, 10, 3), "not divisible by every_steps=3"),
    ((0.5, -5, 10, 5), "before the run"),
    ((0.5, 0, 10, 0), "every_steps=0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SCHEDULES)
def test_an_impossible_schedule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Geometric(*arguments)


BAD_WINDOWS = [
    ((30, 10, "steps", 5), "reversed"),
    ((0.75, 0.25, "compute", None), "reversed"),
    ((10, 50, "steps", 7), "not divisible"),
    ((10, 100, "steps", 10), "outside a run of 100 steps"),
    ((10, 0.75, "auto", 10), "mixes a share with a step"),
    ((10, 20, "compute", 10), "inside 0 to 1"),
    ((2.5, 20, "steps", 10), "not in whole steps"),
]


@pytest.mark.parametrize(("window", "message"), BAD_WINDOWS)
def test_an_impossible_window_is_refused(window, message):
    start, end, of, every = window
    with pytest.raises(ValueError, match=message):
        schedule_of_window(0.8, start, end, of=of, every_steps=every, num_steps=100, batch_tokens=512)


@pytest.mark.parametrize(("steps", "every"), [(320, 100), (40, 100), (40, 20)])
def test_an_interval_too_long_for_the_window_is_refused(steps, every):
    with pytest.raises(ValueError, match=f"every={every} steps between events is too long"):
        compute_window(0.8, 0.25, 0.75, num_steps=steps, every_steps=every)


def test_a_window_without_a_sensible_interval_is_refused():
    with pytest.raises(ValueError, match="5101 steps has no divisor near 100"):
        schedule_of_window(0.8, 2500, 7601, of="steps", every_steps=None, num_steps=9000, batch_tokens=512)


def test_a_window_that_ends_with_the_last_step_fits():
    schedule = schedule_of_window(0.8, 9, 99, of="steps", every_steps=10, num_steps=100, batch_tokens=512)
    assert schedule.density(99) == pytest.approx(0.2)
