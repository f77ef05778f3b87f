"""One run of `python -m tests.gpu recipe`: like `tests.gpu.claim_run`, with the arm's best learning rate and layer densities.

    python -m tests.gpu.recipe_run RUN_DIR key=value ...

Without a learning rate among the overrides it takes the one whose dense twins, in the folders beside RUN_DIR, have the lowest
mean held-out loss.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.gpu.claim_run import report, run
from tests.gpu.recipe import dense_arm

RATE = "optim.learning_rate"


def rate_losses(runs: Path, point: str) -> dict[float, list[float]]:
    """Return the held-out losses of the dense twins of an arm, by learning rate; a run that failed has none."""
    found: dict[float, list[float]] = {}
    for file in sorted(runs.glob(f"{point}-[0-9]*-seed*-twin/summary.json")):
        summary = json.loads(file.read_text())
        loss = summary.get("heldout_loss")
        found.setdefault(summary["learning_rate"], []).append(math.inf if loss is None else loss)
    return found


def best_rate(losses: dict[float, list[float]]) -> float:
    """Return the learning rate with the lowest mean loss among those with the most runs."""
    most = max(len(values) for values in losses.values())
    return min((rate for rate in losses if len(losses[rate]) == most), key=lambda rate: statistics.fmean(losses[rate]))


def layer_densities(model: Path) -> dict[str, float]:
    """Return the share of weights that are not 0, by the name of each matrix in a folder's safetensors files."""
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                if (tensor := tensors.get_tensor(name)).ndim == 2:
                    found[name] = tensor.count_nonzero().item() / tensor.numel()
    return found


def main() -> None:
    run_dir, overrides = Path(sys.argv[1]), sys.argv[2:]
    if not any(item.startswith(f"{RATE}=") for item in overrides):
        point = dense_arm(run_dir.name.split("-")[0])
        losses = rate_losses(run_dir.parent, point)
        if not losses:
            sys.exit(f"no finished run tells the learning rate of {point}")
        overrides.append(f"{RATE}={best_rate(losses):g}")
    seconds = run(overrides)
    found: dict[str, Any] = {
        "name": run_dir.name,
        "seconds": seconds,
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "densities": layer_densities(run_dir / "model"),
    }
    report(found)


if __name__ == "__main__":
    main()
