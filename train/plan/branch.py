"""A run that begins at a checkpoint of another run: where it begins, and what must be as it was. Needs no torch.

`branch_from=RUN[@STEP]` takes over weights, optimizer, masks, the data's position and the average density so far. The other
run is only read. Everything else of the config may change; what did is written down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.schema import Config
from sparsity.schedule import Schedule
from sparsity.scope import Pool
from train.checkpoints import layout

BRANCH = "branch.json"
"""In the folder of a run that branched."""
CONFIG = "config.yaml"
KEPT = ("sparsity.include", "sparsity.requires_dense", "optim.optim")
"""Keys that a branch cannot change, beside the model, the batch and the length of a block."""
NOT_CHANGES = ("branch_from", "run_name", "overwrite", "resume", "dry_run", "next_commands")


@dataclass(frozen=True)
class Branch:
    """Where a run branched from another one."""

    run: str
    """The other run's folder."""
    step: int
    trunk: str
    """The run that the other one branched from in the end, else the other run: points that share it share their steps."""
    changes: tuple[str, ...]
    """`key was VALUE, is VALUE` of every key that differs."""
    is_sparse: bool
    """The checkpoint has masks."""


def parse_branch(text: str) -> tuple[str, int | None]:
    """Return (run, step) of `RUN[@STEP]`; without a step it is None, the newest checkpoint.

    Raises:
        ValueError: What follows the @ is no step.
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
        ValueError: There is no run.
    """
    assert config.branch_from is not None
    name, _ = parse_branch(config.branch_from)
    for folder in (Path(name).expanduser(), Path(config.runs_dir) / name):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(
        f"branch_from={config.branch_from} names no run: give a run's folder, such as {config.runs_dir}/NAME."
    )


def branch_checkpoint(config: Config) -> Path:
    """Return the checkpoint that a branch begins at: that of its step, else the newest whole one.

    Raises:
        ValueError: The run has no such checkpoint, or it is damaged.
    """
    folder = run_folder(config)
    assert config.branch_from is not None
    _, step = parse_branch(config.branch_from)
    found = layout.checkpoints(folder / "checkpoints")
    if step is None:
        if whole := next((one for one in found if layout.damage(one) is None), None):
            return whole
        raise ValueError(f"branch_from={config.branch_from}: {folder} has no whole checkpoint; let it save one first.")
    chosen = next((one for one in found if layout.step_of(one) == step), None)
    if chosen is None:
        steps = ", ".join(str(layout.step_of(one)) for one in reversed(found)) or "none"
        raise ValueError(
            f"branch_from={config.branch_from}: {folder} keeps no checkpoint of step {step} (kept: {steps}); name one of "
            "these, or keep it in the run from the start by trainer.keep_steps."
        )
    if (problem := layout.damage(chosen)) is not None:
        raise ValueError(f"branch_from={config.branch_from}: {chosen} is damaged ({problem}); name another step.")
    return chosen


def planned_steps(config: Config) -> int | None:
    """Return the steps of a run whose trainer.max_steps is null because it decays at once from where it branches.

    With optim.decay_steps=D that is STEP + D, and with a share D of the run STEP / (1 - D). None for any other run.
    """
    decay = config.trainer.decay_steps
    if config.branch_from is None or config.trainer.max_steps is not None or decay is None:
        return None
    _, step = parse_branch(config.branch_from)
    if step is None or not decay:
        return None
    return round(step / (1 - decay)) if decay < 1 else step + round(decay)


def check_branch(config: Config, num_steps: int, pools: tuple[Pool, ...], schedule: Schedule | None) -> Branch:
    """Return where a run branches.

    Args:
        config: The new run.
        num_steps: Its length.
        pools: The weights that it prunes.
        schedule: When it prunes them; None if it does not.

    Raises:
        ValueError: It says what does not fit, and the remedy.
    """
    parent, checkpoint = run_folder(config), branch_checkpoint(config)
    state = json.loads((checkpoint / layout.STATE).read_text(encoding="utf-8"))
    before, now = _plain(OmegaConf.load(parent / CONFIG)), _plain(OmegaConf.structured(config))
    changes = _changes(before, now)
    step = int(state["step"])
    where = f"branch_from={config.branch_from}"
    for key, (old, new) in changes.items():
        if key.startswith("model.") or key in KEPT or (key == "trainer.optim"):
            raise ValueError(
                f"{where}: {key} was {old} there and is {new} here, and a branch keeps it: set {key}={old}, or start a run "
                f"of its own with init_from={parent}/model."
            )
    if num_steps <= step:
        raise ValueError(
            f"{where} begins at step {step} and the run has {num_steps}: set trainer.max_steps above {step}."
        )
    _check_pruned(where, step, state["sparsity"], pools, schedule)
    inner = read_branch(parent)
    return Branch(
        run=str(parent),
        step=step,
        trunk=inner.trunk if inner else str(parent.resolve()),
        changes=tuple(f"{key} was {old}, is {new}" for key, (old, new) in changes.items()),
        is_sparse=state["sparsity"] is not None,
    )


def check_steps_alike(config: Config, branch: Branch, identity: Mapping[str, Any]) -> None:
    """Refuse another batch or block length than the checkpoint's, by which a step is another number of tokens.

    Raises:
        ValueError: It names both values.
    """
    folder = layout.folder_of(Path(branch.run) / "checkpoints", branch.step)
    before = json.loads((folder / layout.STATE).read_text(encoding="utf-8"))["identity"]
    for key in ("batch_size", "sequence_length"):
        if before[key] != identity[key]:
            raise ValueError(
                f"branch_from={config.branch_from} has {key}={before[key]} and this run {key}={identity[key]}: a branch keeps "
                "it, since its steps go on from there."
            )


def read_branch(run_dir: Path) -> Branch | None:
    """Return where the run of a folder branched, None if it did not."""
    try:
        found = json.loads((run_dir / BRANCH).read_text(encoding="utf-8"))
        return Branch(**{**found, "changes": tuple(found["changes"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{run_dir / BRANCH} is garbled: set overwrite=true to branch anew.") from None


def branch_text(branch: Branch) -> str:
    return json.dumps(asdict(branch), indent=2) + "\n"


def branch_words(branch: Branch) -> str:
    """Return where a run branched and what changed, in words."""
    changed = "; ".join(branch.changes) if branch.changes else "nothing changed"
    return f"branched from {branch.run} at step {branch.step:,}: {changed}"


def _check_pruned(
    where: str, step: int, saved: Mapping[str, Any] | None, pools: tuple[Pool, ...], schedule: Schedule | None
) -> None:
    """Refuse a schedule that would have pruned more before the step than the other run has."""
    if schedule is None:
        return
    kept = {} if saved is None else saved["kept"]
    for pool in pools:
        wanted = pool.num_pruned(schedule, step - 1)
        found = 0 if saved is None else pool.numel - sum(kept[name] for name in pool.names)
        if wanted > found:
            raise ValueError(
                f"{where} has {found:,} of {pool.numel:,} weights pruned at step {step:,}, where this schedule has pruned "
                f"{wanted:,}: begin the window at step {step} or later."
            )


def _plain(config: Any) -> dict[str, Any]:
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), config))
    assert isinstance(merged, dict)
    # Null stands for one of these, and a run writes down which.
    merged["tokenizer"] = merged["tokenizer"] or merged["init_from"] or merged["model"]["path"] or "train"
    return {
        key: value
        for key, value in _flat(merged)
        if key.split(".")[0] not in (*NOT_CHANGES, "launch", "logger", "card")
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    # The group optim is in the group trainer too, whose values count.
    names = [name for name in {**before, **now} if not name.startswith("optim.")]
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
