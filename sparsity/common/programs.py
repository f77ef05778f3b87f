"""Other programs whose output is read as text: SLURM's commands, nvidia-smi, git."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence


def run_program(
    command: Sequence[str], *, timeout_s: float = 60, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a program and return its output as text, with a mark for each byte that is not UTF-8.

    Args:
        command: The program and its arguments.
        timeout_s: The seconds after which it is killed.
        check: Raise an error if it fails.

    Raises:
        OSError: The program is not installed.
        subprocess.TimeoutExpired: It takes longer than `timeout_s`.
        subprocess.CalledProcessError: It fails and `check` is set.
    """
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=check
    )
