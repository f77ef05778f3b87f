"""Running the project's commands as a user would, with a timeout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def run_command(
    arguments: Sequence[str], *, cwd: Path = ROOT, timeout_s: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` on the CPU, offline, with one thread per process, and capture its output."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=quiet_environment(environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def quiet_environment(changes: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        # This checkout comes before other copies on the path.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


def errors_in(stderr: str) -> list[str]:
    """Return the lines of errors that a user sees."""
    return [line for line in stderr.splitlines() if line.startswith("error:")]
