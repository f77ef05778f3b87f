"""Which runs are meant: run folders, folders of runs, and patterns of both."""

from __future__ import annotations

import glob
from pathlib import Path


def named_places(pattern: str) -> list[Path]:
    """The files and folders that a name or a pattern names, sorted; a ValueError where there is none."""
    if Path(pattern).exists():
        return [Path(pattern)]
    places = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not places:
        raise ValueError(f"runs={pattern} is not there: give run folders, a folder of runs, or a pattern of them.")
    return places


def run_folders(place: Path, marker: str) -> list[Path]:
    """`place` where it is a run itself, holding the file `marker`; else the runs anywhere below it, sorted."""
    if (place / marker).is_file():
        return [place]
    return [file.parent for file in sorted(place.rglob(marker))]
