"""The run folders that names and patterns of folders stand for."""

from __future__ import annotations

import glob
from pathlib import Path


def named_places(pattern: str) -> list[Path]:
    """Return the files and folders that a name or a pattern names, sorted.

    Raises:
        ValueError: Nothing matches.
    """
    if Path(pattern).exists():
        return [Path(pattern)]
    places = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not places:
        raise ValueError(f"runs={pattern} is not there: give run folders, a folder of runs, or a pattern of them.")
    return places


def run_folders(place: Path, marker: str) -> list[Path]:
    """Return `place` if it holds the file `marker` and so is a run itself, else all runs below it, sorted."""
    if (place / marker).is_file():
        return [place]
    return [file.parent for file in sorted(place.rglob(marker))]
