"""The results of `python -m tests.gpu recipe` as a page and a figure: docs/recipe.md and docs/recipe.png.

python -m tests.gpu.recipe_page [docs/recipe.json] [--output docs/recipe.md]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.runs.pairs.comparison import Spread
from tests.benchmarks.page import table
from tests.gpu.claim_page import device_of
from tests.gpu.recipe import POINTS, dense_arm
from train.record.style import BLUE, GREY, ORANGE, lighten, pyplot

HEAD = """# Which points of the authors' recipe matter

Made from recipe.json by `python -m tests.gpu.recipe_page`. [results.md](results.md) says what it means.
"""
WORDS = {
    "plain": "recipe=plain",
    "init": "model.init=authors",
    "folded": "model.query_scale=folded",
    "documents": "data.attention=document",
    "authors": "recipe=authors",
    "normalized": "sparsity.normalize=rms",
}
"""The change of each arm to recipe=plain, in the words of the page."""
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
POWER = (1.960 + 0.842) ** 2
"""Squared sum of the normal quantiles of a test at 5 % from both sides that finds a difference 80 times of 100."""


@dataclass(frozen=True)
class Run:
    """One finished run of an arm. Losses in nats a token."""

    point: str
    kind: str
    """`sparse`, `twin`, or `dense` for the dense model of the full size."""
    seed: int
    rate: float
    loss: float
    densities: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """An arm at its learning rate."""

    point: str
    rate: float
    dense: float | None
    twin: Spread
    sparse: Spread
    gaps: tuple[float, ...]
    """Sparse less twin, a value for each seed."""

    @property
    def gap(self) -> Spread:
        return Spread.of(self.gaps)


def read_runs(result: Mapping[str, Any]) -> list[Run]:
    """Return the finished runs of a results file."""
    found = []
    for step in result["steps"]:
        figures = step.get("figures") or {}
        if step["outcome"] != "passed" or "summary" not in figures:
            continue
        summary, name = figures["summary"], figures["name"]
        kind = "twin" if name.endswith("-twin") else "sparse" if "-80p-" in name else "dense"
        seed = int(name.removesuffix("-twin").rsplit("seed", 1)[1])
        found.append(
            Run(
                name.split("-")[0],
                kind,
                seed,
                summary["learning_rate"],
                summary["heldout_loss"],
                figures.get("densities", {}),
            )
        )
    return found


def outcome(runs: Sequence[Run], point: str) -> Outcome | None:
    """Return an arm's losses and gaps at the learning rate of its sparse runs, or None if it has no pair."""
    sparse = {run.seed: run for run in runs if (run.point, run.kind) == (point, "sparse")}
    rates = {run.rate for run in sparse.values()}
    if len(rates) != 1:
        return None
    rate = rates.pop()
    dense = [run for run in runs if run.point == dense_arm(point) and run.rate == rate]
    twins = {run.seed: run.loss for run in dense if run.kind == "twin"}
    seeds = sorted(sparse.keys() & twins.keys())
    if not seeds:
        return None
    return Outcome(
        point,
        rate,
        next((run.loss for run in dense if run.kind == "dense"), None),
        Spread.of([twins[seed] for seed in seeds]),
        Spread.of([sparse[seed].loss for seed in seeds]),
        tuple(sparse[seed].loss - twins[seed] for seed in seeds),
    )


def seeds_to_show(difference: float, variances: float) -> int:
    """Return how many seeds an arm would show a difference of two means.

    Args:
        difference: Of the means.
        variances: The sum of the variances of one seed in either arm.
    """
    return max(2, math.ceil(POWER * variances / difference**2)) if difference else 10**6


def gaps_table(outcomes: Sequence[Outcome]) -> str:
    """Return losses and gaps by arm, and how far each gap is from that of recipe=plain."""
    plain = next(item for item in outcomes if item.point == "plain")
    rows = []
    for item in outcomes:
        moved = item.gap.mean - plain.gap.mean
        # The spreads of the arms differ too much to be pooled.
        variances = [statistics.variance(one.gaps) if len(one.gaps) > 1 else 0.0 for one in (item, plain)]
        error = math.sqrt(variances[0] / len(item.gaps) + variances[1] / len(plain.gaps))
        rows.append(
            [
                WORDS[item.point],
                f"{item.rate:g}",
                "" if item.dense is None else f"{item.dense:.3f}",
                _spread(item.twin),
                _spread(item.sparse),
                _spread(item.gap, "+"),
                "" if item is plain else f"{moved:+.3f} ± {error:.3f}",
                "" if item is plain else _seeds(moved, sum(variances)),
            ]
        )
    head = ["arm", "rate", "dense", "twin", "80 %", "gap", "gap less plain's", "seeds to show it"]
    return table(head, rows)


def rates_table(runs: Sequence[Run]) -> str:
    """Return the dense twin's losses by arm and learning rate, the mean and each seed's."""
    rows = []
    for point in POINTS:
        found: dict[float, list[float]] = {}
        for run in runs:
            if (run.point, run.kind) == (point, "twin"):
                found.setdefault(run.rate, []).append(run.loss)
        rows += [
            [WORDS[point], f"{rate:g}", f"{statistics.fmean(losses):.3f}", ", ".join(f"{loss:.3f}" for loss in losses)]
            for rate, losses in sorted(found.items())
        ]
    return table(["arm", "rate", "twin", "each seed"], rows)


def kind_densities(runs: Sequence[Run], point: str) -> dict[str, float]:
    """Return the final density of each kind of layer, the mean over blocks and seeds of an arm's sparse runs."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if (run.point, run.kind) == (point, "sparse"):
            for name, density in run.densities.items():
                for kind in KINDS:
                    if f".{kind}." in f".{name}":
                        found.setdefault(kind, []).append(density)
    return {kind: statistics.fmean(found[kind]) for kind in KINDS if kind in found}


def densities_table(runs: Sequence[Run], outcomes: Sequence[Outcome]) -> str:
    rows = []
    for item in outcomes:
        densities = kind_densities(runs, item.point)
        rows.append([WORDS[item.point], *(f"{densities[kind]:.3f}" if kind in densities else "" for kind in KINDS)])
    return table(["arm", *KINDS], rows)


def draw(runs: Sequence[Run], outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw the gaps, a mark a seed, and the final density of each kind of layer."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(1, 1.3))
    for index, item in enumerate(reversed(outcomes)):
        left.plot(item.gaps, [index] * len(item.gaps), "o", color=BLUE, alpha=0.5, markersize=6)
        left.plot([item.gap.mean], [index], "|", color=ORANGE, markersize=22, markeredgewidth=2.5)
    left.axvline(0, color=GREY, linewidth=1)
    left.set_yticks(range(len(outcomes)), [WORDS[item.point] for item in reversed(outcomes)])
    left.set_xlabel("held-out loss of the 80 % run less its twin's (nats per token)")
    left.set_title("gap: each seed, and the mean", loc="left", fontweight="bold")
    colors = plt.get_cmap("tab10").colors
    width = 0.8 / len(outcomes)
    for index, item in enumerate(outcomes):
        densities = kind_densities(runs, item.point)
        places = [place + (index - (len(outcomes) - 1) / 2) * width for place in range(len(KINDS))]
        right.bar(
            places, [densities.get(kind, 0.0) for kind in KINDS], width, color=colors[index], label=WORDS[item.point]
        )
    right.axhline(0.2, color=GREY, linestyle="--", linewidth=1)
    right.set_xticks(range(len(KINDS)), KINDS, fontsize=8)
    right.set_ylabel("final density")
    right.set_title("what a global threshold keeps", loc="left", fontweight="bold")
    right.set_ylim(0, 1.3 * right.get_ylim()[1])
    right.legend(frameon=False, fontsize=8, ncols=2)
    for axes in (left, right):
        lighten(axes)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def page(result: Mapping[str, Any], figure: Path | None = None) -> str:
    """Return the page of a results file, and draw its figure if a path is given."""
    runs = read_runs(result)
    outcomes = [found for point in POINTS if (found := outcome(runs, point)) is not None]
    if figure is not None:
        draw(runs, outcomes, figure)
    return (
        "\n\n".join(
            [
                HEAD.rstrip(),
                device_of(result),
                "![the gap of each arm, and the densities of its layers](recipe.png)",
                "## Gaps to the twin\n\nHeld-out nats a token, mean ± sample standard deviation over seeds; a gap is the mean "
                "of the seeds' differences. The next column has the standard error of the difference from plain, from the "
                "spreads of both arms; the last one tells how many seeds an arm would show it (a two-sided test at 5 % that "
                "finds it 80 times of 100).",
                gaps_table(outcomes),
                "## Layer densities\n\nShare of weights left at the end, the mean over blocks and seeds.",
                densities_table(runs, outcomes),
                "## Learning rates\n\nThe dense twin's held-out loss. The lowest mean of two seeds decides an arm's rate.",
                rates_table(runs),
            ]
        )
        + "\n"
    )


def _spread(value: Spread, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f}" + ("" if value.std is None else f" ± {value.std:.3f}")


def _seeds(difference: float, variances: float) -> str:
    found = seeds_to_show(difference, variances)
    return f"{found:,}" if found <= 1000 else "over 1,000"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/recipe.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/recipe.md"))
    options = parser.parse_args(arguments)
    result = json.loads(options.file.read_text(encoding="utf-8"))
    options.output.write_text(page(result, options.output.with_suffix(".png")), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
