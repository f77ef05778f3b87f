"""Do one run of the claim through `python -m launch`; its settings and results go into the step's figures.

    python -m tests.gpu.claim_run RUN_DIR key=value ...

RUN_DIR is the folder that the run will have. The figures hold all of config.yaml and summary.json, so that
`python -m tests.gpu.claim_page` can compare the runs when the machine is no longer there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.runner import FIGURES, ROOT

CURVE_POINTS = 64


def figures(run_dir: Path, seconds: float) -> dict[str, Any]:
    """Return the finished run's config.yaml, summary.json and curve, reduced to 64 records."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/loss" in record]
    thin = max(1, len(steps) // CURVE_POINTS)
    keys = ("step", "train/loss", "train/grad_norm", "sparsity/density", "perf/tokens_per_second", "perf/mfu")
    return {
        "name": run_dir.name,
        "seconds": seconds,
        "config": (run_dir / "config.yaml").read_text(),
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "curve": [{key: record[key] for key in keys if key in record} for record in steps[::thin]],
        "last_record": records[-1],
    }


def words(summary: dict[str, Any], seconds: float) -> str:
    loss = summary.get("heldout_loss")
    shown = "no held-out loss" if loss is None else f"held-out loss {loss:.4f}"
    return (
        f"{shown}, N-bar {summary['avg_linear_params'] / 1e6:.2f} M, {summary['total_tokens'] / 1e6:.1f} M tokens, "
        f"{summary['total_tokens'] / seconds / 1e3:,.0f}k a second with start and end"
    )


def run(overrides: Sequence[str]) -> float:
    """Launch a run and return the seconds that it took; exit if it fails."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "launch", *overrides], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"the run ended with {done.returncode}")
    return time.monotonic() - started


def report(found: dict[str, Any]) -> None:
    """Write a run's figures to the step's file, and print one line."""
    if FIGURES in os.environ:
        Path(os.environ[FIGURES]).write_text(json.dumps(found))
    print(words(found["summary"], found["seconds"]))


def main() -> None:
    run_dir, overrides = Path(sys.argv[1]), sys.argv[2:]
    seconds = run(overrides)
    report(figures(run_dir, seconds))


if __name__ == "__main__":
    main()
