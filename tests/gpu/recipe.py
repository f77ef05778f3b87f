"""The steps of `python -m tests.gpu recipe`: which points of the authors' recipe change the sparse run and its twin.

Each arm changes one point of recipe=plain; recipe=authors changes all but the scores. An arm has the learning rate whose dense
twins have the lowest held-out loss, so the rates come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.gpu.claim import PYTHON, REHEARSED_SECONDS, TWIN, Arm, shared_overrides, start_steps
from tests.gpu.runner import Step

POINTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("recipe=plain",),
    "init": ("recipe=plain", "model.init=authors"),
    "folded": ("recipe=plain", "model.query_scale=folded"),
    "documents": ("recipe=plain", "data.attention=document"),
    "authors": ("recipe=authors",),
    "normalized": ("recipe=plain", "sparsity.normalize=rms"),
}
"""The settings that each arm changes, by its name."""
DENSE_OF = {"normalized": "plain"}
"""Arms that change the sparse run alone share the dense runs of another."""
RATES = (3e-3, 6e-3, 1.2e-2)
MORE_RATES: Mapping[str, tuple[float, ...]] = {"init": (2.4e-2, 4.8e-2), "authors": (2.4e-2, 4.8e-2)}
"""Rates of arms whose best of `RATES` is the highest."""
SEEDS = (0, 1, 2)
RATE_SEEDS = (0, 1)
SPARSITY = "sparsity.target=0.8"
EXPECTED_S, LIMIT_S = 30.0, 1800.0
"""Seconds that a run takes on a GPU, and the most that it may take, on CPUs too."""


def dense_arm(point: str) -> str:
    """Return the arm whose dense runs belong to `point`."""
    return DENSE_OF.get(point, point)


def rate_arms() -> list[Arm]:
    """Return the dense twins of the 80 % run at three rates or more and two seeds, for every arm with its own dense runs."""
    return [
        Arm(
            f"{point}-{rate:g}-seed{seed}",
            (*POINTS[point], SPARSITY, TWIN, f"optim.learning_rate={rate:g}", f"trainer.seed={seed}"),
        )
        for point in POINTS
        if dense_arm(point) == point
        for rate in (*RATES, *MORE_RATES.get(point, ()))
        for seed in RATE_SEEDS
    ]


def pair_arms() -> list[Arm]:
    """Return the sparse runs of every arm, the twins of the seeds without one, and a dense run of the full size.

    Their learning rate is missing: `tests.gpu.recipe_run` takes it from the runs of `rate_arms`.
    """
    found = []
    for point, changes in POINTS.items():
        found += [Arm(f"{point}-80p-seed{seed}", (*changes, SPARSITY, f"trainer.seed={seed}")) for seed in SEEDS]
        if dense_arm(point) == point:
            left = [seed for seed in SEEDS if seed not in RATE_SEEDS]
            found += [Arm(f"{point}-seed{seed}", (*changes, SPARSITY, TWIN, f"trainer.seed={seed}")) for seed in left]
            found.append(Arm(f"{point}-dense-seed0", (*changes, "sparsity=dense", "trainer.seed=0")))
    return found


def recipe_steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    """Return the device, the text, the runs at given learning rates, then those at the rates that were best."""
    shared = shared_overrides(work, rehearse, more)
    arms = [*rate_arms(), *pair_arms()]
    return [*start_steps(shared, rehearse), *(run_step(arm, work, shared, rehearse) for arm in arms)]


def run_step(arm: Arm, work: Path, shared: Sequence[str], rehearse: bool) -> Step:
    command = (
        PYTHON, "-m", "tests.gpu.recipe_run", str(work / "runs" / arm.folder), f"run_name={arm.name}", *arm.overrides, *shared,
    )  # fmt: skip
    expected = REHEARSED_SECONDS if rehearse else EXPECTED_S
    return Step(arm.folder, command, expected_s=expected, timeout_s=LIMIT_S, says="held-out loss")
