"""The record of a branch, a run that begins at a checkpoint of another run: which run and step that was.

`branch_from=RUN[@STEP]` takes over weights, optimizer, masks, the position in the data and the average density so far. The
other run is only read. Everything else in the config may change, and the changes are recorded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.schema import Config

BRANCH = "branch.json"
"""The name of the record in the folder of a run that branched."""
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Past:
    """The steps of another run that a branch continues."""

    step: int
    """The number of these steps."""
    density_sum: float
    """The sum of the density of the prunable weights over them."""
    num_prunable: int
    """The number of weights that have masks; 0 after a dense run."""
    num_pruned: int
    """The number of weights that are pruned after these steps."""

    @property
    def density(self) -> float:
        """The density of the prunable weights after these steps."""
        return 1.0 - self.num_pruned / self.num_prunable if self.num_prunable else 1.0

    def average_density(self, density_at: Callable[[int], float], num_steps: int) -> float:
        """Return the mean density over all steps of a run.

        Args:
            density_at: Returns the density while a step of the branch runs.
            num_steps: The steps of the whole run.
        """
        return (self.density_sum + math.fsum(map(density_at, range(self.step, num_steps)))) / num_steps


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
    """True if the checkpoint has masks."""
    past: Past | None = None
    """The steps before the branch."""
    blocks: Mapping[str, int] = field(default_factory=dict)
    """The blocks taken by then from each source of text that the run and those before it have used, by name."""


def parse_branch(text: str) -> tuple[str, int | None]:
    """Return (run, step) of `RUN[@STEP]`; the step is None if it is left out, which means the newest checkpoint."""
    run, _, step = text.rpartition("@")
    return (run, int(step)) if run and step.isdecimal() else (text, None)


def run_folder(config: Config) -> Path:
    """Return the folder of the run that `branch_from` names: a path, or a name below `runs_dir`.

    Raises:
        ValueError: There is no such run.
    """
    assert config.branch_from is not None
    name, _ = parse_branch(config.branch_from)
    places = Path(name).expanduser(), Path(config.runs_dir) / name
    for folder in places:
        if (folder / CONFIG).is_file():
            return folder
    where = f"branch_from={config.branch_from} names no run of sparsellm"
    if any(folder.name.startswith("checkpoint-") and folder.is_dir() for folder in places):
        raise ValueError(f"{where} but a checkpoint: write RUN@STEP, such as {config.runs_dir}/demo@160.")
    if any(folder.is_dir() and next(folder.glob("checkpoint-*"), None) for folder in places):
        raise ValueError(
            f"{where}, but the checkpoints of another Trainer: start a new run with init_from={name}/checkpoint-STEP."
        )
    raise ValueError(f"{where}: write RUN or RUN@STEP, such as {config.runs_dir}/demo or {config.runs_dir}/demo@160.")


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
        past = None if found.get("past") is None else Past(**found["past"])
        return Branch(**{**found, "changes": tuple(found["changes"]), "past": past})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{run_dir / BRANCH} is garbled: set overwrite=true to branch again.") from None


def branch_text(branch: Branch) -> str:
    """Return the content of a run's branch file."""
    return json.dumps(asdict(branch), indent=2) + "\n"


def branch_figures(branch: Branch) -> dict[str, Any]:
    """Return a run's summary entries about its branch."""
    return {"run": Path(branch.run).name, "step": branch.step, "trunk": branch.trunk}


def branch_words(branch: Branch) -> str:
    """Return a sentence that says where a run branched and what changed."""
    changed = "; ".join(branch.changes) if branch.changes else "nothing changed"
    return f"branched from {branch.run} at step {branch.step:,}: {changed}"


def public_branch_words(branch: Branch) -> str:
    """Return `branch_words` with only the last part of each path, so that a model card says nothing about the machine."""
    words = branch_words(replace(branch, run=Path(branch.run).name))
    return re.sub(r"(?<![\w/])(?:~|\.{1,2})?/(?:[^\s/,;'\]}]+/)*", "", words)
