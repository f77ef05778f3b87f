"""A figure of the density of one run or of a series: the share of the linear weights kept at each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.plan.run import RunPlan


def draw_density(plans: Sequence[RunPlan], file: Path) -> None:
    """Draw density over steps, with each run's average as a dashed line; in a series, dense runs are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    sparse = [plan for plan in plans if plan.schedule]
    for index, plan in enumerate(sparse or plans):
        color, average = f"C{index}", plan.average_density
        steps, densities = density_curve(plan)
        axes.plot(steps, densities, color=color, linewidth=2, label=f"{plan.run_dir.name}, on average {average:.4f}")
        axes.plot([0, plan.num_steps], [average, average], color=color, linewidth=1, linestyle="--")
        if len(plans) == 1:
            axes.fill_between(steps, densities, color=color, alpha=0.12, linewidth=0)
    if len(plans) == 1 and plans[0].schedule:
        start, end = plans[0].schedule.start_step, plans[0].schedule.end_step
        axes.axvspan(start, end, color="0.5", alpha=0.1, linewidth=0, label=f"prune window, {start:,} to {end:,}")
    axes.set(xlabel="optimizer step", ylabel="density: share of linear weights kept", ylim=(0, 1.04), xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    try:
        figure.savefig(file, dpi=150)
    finally:
        plt.close(figure)


def density_curve(plan: RunPlan) -> tuple[list[int], list[float]]:
    """Return the corners of the staircase: two points for each change of density, from step 0 to the end of the run."""
    steps, densities = [0], [1.0]
    if plan.schedule:
        for step in plan.schedule.events():
            steps += [step, step]
            densities += [densities[-1], plan.schedule.density(step)]
    return [*steps, plan.num_steps], [*densities, densities[-1]]
