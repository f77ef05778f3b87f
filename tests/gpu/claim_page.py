"""Write the results of `python -m tests.gpu claim` and `rates` as a page and a figure: docs/claim.md and docs/claim.png.

    python -m tests.gpu.claim_page [docs/gpu] [--output docs/claim.md]

The result files hold each run's settings and summary, so this command can compare the pairs and fit the law without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema.law import ScalingLawConfig
from eval.runs.law.fit import bootstrap, fit_law
from eval.runs.law.points import read_points
from eval.runs.law.report import interval, report
from eval.runs.law.text import report_text
from eval.runs.pairs.comparison import compare, read_trials
from eval.runs.pairs.figure import draw_pairs
from eval.runs.pairs.text import markdown
from tests.benchmarks.page import table
from tests.gpu.page import origin

HEAD = """# The paper's claim on one GPU

Made from gpu/claim.json, gpu/claim_plain.json and gpu/rates.json by `python -m tests.gpu.claim_page`.
[results.md](results.md) says what it means. `.claim/text` is what `python -m tests.gpu.docstrings .claim/text` makes.
"""


CARDS = Path(__file__).resolve().parents[2] / "docs" / "cards.csv"
NUM_RESAMPLES = 400
RATES_WORDS = """The dense twin of the 80 % run of a model of 7.3 M linear parameters (width 256), 384 steps. The claim's model
was made narrower afterwards, so that all its runs fit into nine minutes."""


def write_runs(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write config.yaml and summary.json of each run in a results file below `folder`, and return the runs' folders."""
    written = []
    for step in result["steps"]:
        figures = step.get("figures") or {}
        if step["outcome"] == "passed" and "summary" in figures:
            run = folder / figures["name"]
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(figures["config"], encoding="utf-8")
            (run / "summary.json").write_text(json.dumps(figures["summary"]), encoding="utf-8")
            written.append(run)
    return written


def device_of(result: dict[str, Any]) -> str:
    """Return command, day, device, versions and training text in one line."""
    figures = {step["name"]: step.get("figures") or {} for step in result["steps"]}
    text = figures.get("text", {})
    tokens = (
        f" Text: {text['train_bytes'] / 1e6:.1f} MB, {text['train_tokens'] / 1e6:.1f} M tokens of {text['train_documents']:,} "
        f"documents, read {text['epochs']:.2f} times."
        if text
        else ""
    )
    device = figures.get("device") or result.get("device", {})
    return f"`{result['command']}` on {result['started'][:10]}; {origin(device)}.{tokens}"


def rates_section(result: dict[str, Any]) -> str:
    """Return the dense twins' held-out losses by name and learning rate: the mean and every seed."""
    found: dict[tuple[str, float], list[float]] = {}
    for step in result["steps"]:
        figures = step.get("figures") or {}
        if step["outcome"] == "passed" and "summary" in figures:
            summary = figures["summary"]
            key = (step["name"].split("-")[0], summary["learning_rate"])
            found.setdefault(key, []).append(summary["heldout_loss"])
    rows = [
        [recipe, f"{rate:g}", f"{statistics.fmean(losses):.4f}", ", ".join(f"{loss:.4f}" for loss in losses)]
        for (recipe, rate), losses in sorted(found.items())
    ]
    head = f"## Learning rate\n\n{device_of(result)}\n\n{RATES_WORDS}\n"
    return "\n".join([head, table(["runs", "learning rate", "held-out loss", "each seed"], rows)])


def runs_section(result: dict[str, Any], title: str = "Runs") -> str:
    rows = []
    for step in result["steps"]:
        summary = (step.get("figures") or {}).get("summary")
        if summary:
            rows.append(
                [
                    step["name"],
                    f"{summary['avg_linear_params'] / 1e6:.3f} M",
                    f"{summary['nonzero_linear_params'] / 1e6:.3f} M",
                    f"{summary['total_tokens'] / summary['avg_linear_params']:.0f}",
                    f"{summary['heldout_loss']:.4f}",
                    f"{summary['final_train_loss']:.4f}",
                    f"{step['seconds']:.0f} s",
                ]
            )
        elif step["name"] not in ("device", "text"):
            rows.append([step["name"], "", "", "", step["outcome"], "", f"{step['seconds']:.0f} s"])
    head = ["run", "N-bar", "final N", "tokens / N-bar", "held-out loss", "training loss", ""]
    return "\n".join([f"## {title}\n", f"{device_of(result)}\n", table(head, rows)])


def claim_sections(result: dict[str, Any], figure: Path | None) -> list[str]:
    """Return the sections about the runs, their pairs and the law; draw the figure if a path is given."""
    parts = [runs_section(result)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "claim"
        write_runs(result, folder)
        runs = read_trials([str(folder)])
        comparisons = compare(runs)
        if figure is not None:
            draw_pairs(runs, comparisons, figure)
        parts.append("## Sparse runs and their twins\n\n" + markdown(comparisons))
        config = ScalingLawConfig(runs=[str(folder)], form="power", figure=None)
        figures, _ = report(config, read_points(config.runs, config.loss))
        parts.append(f"## The law\n\n```\n{report_text(figures).rstrip()}\n```")
    return parts


def series_section(result: dict[str, Any], cards: Path = CARDS) -> str:
    """Return the losses that a power law of the dense runs predicts for the series' eight models, and the cards'."""
    runs = [(step.get("figures") or {}).get("summary") for step in result["steps"] if step["outcome"] == "passed"]
    dense = [run for run in runs if run and not run["sparsity"]]
    params, tokens, loss = (
        np.array([run[key] for run in dense], dtype=float)
        for key in ("avg_linear_params", "total_tokens", "heldout_loss")
    )
    fit = fit_law(params, tokens, loss, "power")
    laws = bootstrap(fit, NUM_RESAMPLES, seed=0)
    rows = []
    for point in read_points([str(cards)]).points:
        low, high = interval(laws, lambda law: float(law.loss(point.avg_linear_params, 1.0)), 0.95)  # noqa: B023
        rows.append(
            [
                point.name,
                f"{point.avg_linear_params / 1e9:.2f} B",
                f"{point.loss:.3f}",
                f"{float(fit.law.loss(point.avg_linear_params, 1.0)):.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
        )
    law = ", ".join(f"{name} = {value:.4g}" for name, value in fit.law.coefficients.items())
    head = (
        f"## From small to large, on paper\n\nL = A / N^alpha fitted to the {len(dense)} dense runs, {law}, at the N-bar of "
        f"the series' models; intervals of 95 %, {NUM_RESAMPLES} resamples.\n"
    )
    return "\n".join([head, table(["model", "N-bar", "card", "predicted", "interval"], rows)])


def page(folder: Path, figure: Path | None = None) -> str:
    """Return the page of the result files in `folder`; sections of missing files are left out."""
    parts = [HEAD.rstrip()]
    if (file := folder / "claim.json").is_file():
        result = json.loads(file.read_text(encoding="utf-8"))
        parts += [*claim_sections(result, figure), series_section(result)]
        parts.insert(2, "![held-out loss against average linear parameters](claim.png)")
    if (file := folder / "claim_plain.json").is_file():
        parts.append(runs_section(json.loads(file.read_text(encoding="utf-8")), "The 80 % pair by recipe=plain"))
    if (file := folder / "rates.json").is_file():
        parts.append(rates_section(json.loads(file.read_text(encoding="utf-8"))))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/gpu"))
    parser.add_argument("--output", type=Path, default=Path("docs/claim.md"))
    options = parser.parse_args(arguments)
    options.output.write_text(page(options.folder, options.output.with_suffix(".png")), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
