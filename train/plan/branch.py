"""The record of a branch, a run that begins at a checkpoint of another run: which run and step that was.

`branch_from=RUN[@STEP]` takes over weights, optimizer, masks, the position in the data and the average density so far. The
other run is only read. Everything else in the config may change, and the changes are recorded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config

BRANCH = "branch.json"
"""The name of the record in the folder of a run that branched."""
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Branch:
    """The point at which a run branched from another one."""

    run: str
    """The other run's folder."""
    step: int
    trunk: str
    """The run with which a chain of branches began; runs with the same trunk share their first steps."""
    changes: tuple[str, ...]
    """`key was VALUE, is VALUE` for every key that differs."""
    is_sparse: bool
    """Whether the checkpoint has masks."""


def parse_branch(text: str) -> tuple[str, int | None]:
    """Return (run, step) of `RUN[@STEP]`; the step is None if it is left out, which means the newest checkpoint.

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
    """Return the total steps of a branch that only decays its learning rate; None for any other run.

    Such a branch begins at STEP, has no trainer.max_steps, and decays from its first step on. With optim.decay_steps=D
    it ends at step STEP + D, or if D is a share of the run, at STEP / (1 - D).
    """
    decay = config.trainer.decay_steps
    if config.branch_from is None or config.trainer.max_steps is not None or decay is None:
        return None
    _, step = parse_branch(config.branch_from)
    if step is None or not decay:
        return None
    return round(step / (1 - decay)) if decay < 1 else step + round(decay)


def read_branch(run_dir: Path) -> Branch | None:
    """Return the point at which the run in a folder branched; None if it did not.

    Raises:
        ValueError: The record is garbled.
    """
    try:
        found = json.loads((run_dir / BRANCH).read_text(encoding="utf-8"))
        return Branch(**{**found, "changes": tuple(found["changes"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{run_dir / BRANCH} is garbled: set overwrite=true to branch anew.") from None


def branch_text(branch: Branch) -> str:
    return json.dumps(asdict(branch), indent=2) + "\n"


def branch_figures(branch: Branch) -> dict[str, Any]:
    """Return a run's summary entries about its branch."""
    return {"run": Path(branch.run).name, "step": branch.step, "trunk": branch.trunk}


def branch_words(branch: Branch) -> str:
    """Return a sentence that says where a run branched and what changed."""
    changed = "; ".join(branch.changes) if branch.changes else "nothing changed"
    return f"branched from {branch.run} at step {branch.step:,}: {changed}"
