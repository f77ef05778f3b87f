"""The figure that a command draws into a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def write_figure(file: str | None, draw: Callable[[Path], object]) -> None:
    """Make the folder of `file`, draw into it, and say so on stderr; do nothing if no file is asked for."""
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        draw(Path(file))
        print(f"wrote {file}", file=sys.stderr)
