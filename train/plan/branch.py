"""A run that begins at a checkpoint of another run: which run and step, and the record of it.

`branch_from=RUN[@STEP]` takes over weights, optimizer, masks, the data's position and the average density so far. The
other run is only read. Everything else in the config may change; the changes are recorded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config

BRANCH = "branch.json"
"""The file's name in the folder of a run that branched."""
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Branch:
    """The point at which a run branched from another one."""

    run: str
    """The other run's folder."""
    step: int
    trunk: str
    """The run at the root of a chain of branches; runs with the same trunk share their first steps."""
    changes: tuple[str, ...]
    """`key was VALUE, is VALUE` for every key that differs."""
    is_sparse: bool
    """Whether the checkpoint has masks."""


def parse_branch(text: str) -> tuple[str, int | None]:
    """Return (run, step) of `RUN[@STEP]`; without a step it is None, which means the newest checkpoint.

    Raises:
        ValueError: The text after the @ is not a step.
    """
    run, at, step = text.rpartition("@")
    if not at:
        return text, None
    if not step.isdecimal() or not run:
        raise ValueError(f"branch_from={text} has no step after the @: write RUN or RUN@STEP, such as runs/demo@160.")
    return run, int(step)


def run_folder(config: Config) -> Path:
    """Return the folder of the run that `branch_from` names: a path, or a name below `runs_dir`.

    Raises:
        ValueError: There is no such run.
    """
    assert config.branch_from is not None
    name, _ = parse_branch(config.branch_from)
    for folder in (Path(name).expanduser(), Path(config.runs_dir) / name):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(
        f"branch_from={config.branch_from} names no run: give a run's folder, such as {config.runs_dir}/NAME."
    )


def planned_steps(config: Config) -> int | None:
    """Return the steps of a branch whose trainer.max_steps is null and whose learning rate decays from the first step on.

    With optim.decay_steps=D these are STEP + D, and with a share D of the run STEP / (1 - D). None for any other run.
    """
    decay = config.trainer.decay_steps
    if config.branch_from is None or config.trainer.max_steps is not None or decay is None:
        return None
    _, step = parse_branch(config.branch_from)
    if step is None or not decay:
        return None
    return round(step / (1 - decay)) if decay < 1 else step + round(decay)


def read_branch(run_dir: Path) -> Branch | None:
    """Return where the run in a folder branched; None if it did not."""
    try:
        found = json.loads((run_dir / BRANCH).read_text(encoding="utf-8"))
        return Branch(**{**found, "changes": tuple(found["changes"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{run_dir / BRANCH} is garbled: set overwrite=true to branch anew.") from None


def branch_text(branch: Branch) -> str:
    """Return the content of a run's branch file."""
    return json.dumps(asdict(branch), indent=2) + "\n"


def branch_figures(branch: Branch) -> dict[str, Any]:
    """Return the entries about its branch in a run's summary."""
    return {"run": Path(branch.run).name, "step": branch.step, "trunk": branch.trunk}


def branch_words(branch: Branch) -> str:
    """Return a sentence on where a run branched and what changed."""
    changed = "; ".join(branch.changes) if branch.changes else "nothing changed"
    return f"branched from {branch.run} at step {branch.step:,}: {changed}"
