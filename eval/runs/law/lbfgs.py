"""L-BFGS for a batch of small independent problems, of a few parameters each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Objective = Callable[[Array, NDArray[np.intp]], tuple[Array, Array]]

ARMIJO = 1e-4
MAX_HALVINGS = 20


def minimise(
    objective: Objective, starts: Array, *, max_iterations: int = 500, memory: int = 10, tolerance: float = 1e-10
) -> tuple[Array, Array]:
    """Return (minimisers [problems, parameters], minima [problems]) of independent problems, each from its own start.

    Args:
        objective: Called with the parameters and indices of some problems; returns their values, at least 0, and gradients.
        starts: The starting points [problems, parameters].
        max_iterations: The most steps of a problem.
        memory: The number of past steps that approximate the Hessian.
        tolerance: A problem ends when two successive steps lower it by no more than this share of its value, or by no more
            than this number if the value is below 1.
    """
    x, idle = starts.copy(), np.zeros(len(starts), dtype=int)
    value, gradient = objective(x, np.arange(len(x)))
    steps = np.zeros((memory, *x.shape))
    changes = np.zeros_like(steps)
    curvature = np.zeros((memory, len(x)))
    for iteration in range(max_iterations):
        live = np.flatnonzero(idle < 2)
        if not len(live):
            break
        newest_first = [(iteration - age - 1) % memory for age in range(min(iteration, memory))]
        direction = -_inverse_hessian_times(gradient[live], steps, changes, curvature, live, newest_first)
        slope = (direction * gradient[live]).sum(-1)
        uphill = slope >= 0
        direction[uphill] = -gradient[live][uphill]
        slope[uphill] = -(gradient[live][uphill] ** 2).sum(-1)
        new_x, new_value, new_gradient = _line_search(objective, x, value, gradient, direction, slope, live)
        step, change = new_x - x[live], new_gradient - gradient[live]
        product = (step * change).sum(-1)
        slot = iteration % memory
        steps[slot], changes[slot], curvature[slot] = 0, 0, 0
        usable = product > 1e-14 * np.linalg.norm(step, axis=-1) * np.linalg.norm(change, axis=-1)
        steps[slot, live], changes[slot, live] = step, change
        curvature[slot, live] = np.where(usable, product, 0)
        small = value[live] - new_value <= tolerance * np.maximum(value[live], 1)
        # After a failed step the history is dropped, so that the next try follows the plain gradient.
        curvature[:, live[small]] = 0
        idle[live] = np.where(small, idle[live] + 1, 0)
        x[live], value[live], gradient[live] = new_x, new_value, new_gradient
    return x, value


def _inverse_hessian_times(
    gradient: Array, steps: Array, changes: Array, curvature: Array, live: NDArray[np.intp], newest_first: list[int]
) -> Array:
    """Apply the two-loop recursion (Nocedal and Wright, algorithm 7.4); pairs with curvature 0 are left out."""
    q, weights, scale, scaled = gradient.copy(), {}, np.ones(len(live)), np.zeros(len(live), dtype=bool)
    for slot in newest_first:
        s, y, sy = steps[slot, live], changes[slot, live], curvature[slot, live]
        usable = sy > 0
        rho = np.where(usable, 1 / np.where(usable, sy, 1), 0)
        weights[slot] = rho * (s * q).sum(-1)
        q -= weights[slot][:, None] * y
        first = usable & ~scaled
        scale = np.where(first, sy / np.maximum((y * y).sum(-1), 1e-300), scale)
        scaled |= usable
    # Before the first pair the scale is unknown, so the first step has a length of one unit of the parameters.
    scale = np.where(scaled, scale, 1 / np.maximum(np.linalg.norm(gradient, axis=-1), 1))
    q *= scale[:, None]
    for slot in reversed(newest_first):
        s, y, sy = steps[slot, live], changes[slot, live], curvature[slot, live]
        rho = np.where(sy > 0, 1 / np.where(sy > 0, sy, 1), 0)
        q += (weights[slot] - rho * (y * q).sum(-1))[:, None] * s
    return q


def _line_search(
    objective: Objective,
    x: Array,
    value: Array,
    gradient: Array,
    direction: Array,
    slope: Array,
    live: NDArray[np.intp],
) -> tuple[Array, Array, Array]:
    """Halve the step until it lowers the value enough (Armijo); a problem without such a step does not move."""
    new_x, new_value, new_gradient = x[live].copy(), value[live].copy(), gradient[live].copy()
    length, open_ = np.ones(len(live)), np.arange(len(live))
    for _ in range(MAX_HALVINGS):
        trial = x[live[open_]] + length[open_, None] * direction[open_]
        trial_value, trial_gradient = objective(trial, live[open_])
        good = trial_value <= value[live[open_]] + ARMIJO * length[open_] * slope[open_]
        accepted = open_[good]
        new_x[accepted], new_value[accepted], new_gradient[accepted] = (
            trial[good],
            trial_value[good],
            trial_gradient[good],
        )
        open_ = open_[~good]
        if not len(open_):
            break
        length[open_] /= 2
    return new_x, new_value, new_gradient
