"""The checkpoint of another run at which a branch begins: finding it, and checking the settings that must not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.schema import Config
from train.checkpoints import layout
from train.plan.branch import CONFIG, Branch, parse_branch, read_branch, run_folder
from train.plan.run import RunPlan

KEPT = ("sparsity.include", "sparsity.requires_dense", "optim.optim")
"""Keys that a branch cannot change, in addition to the model, the batch size and the sequence length."""
NOT_CHANGES = ("branch_from", "run_name", "overwrite", "resume", "dry_run", "next_commands")


def branch_checkpoint(config: Config) -> Path:
    """Return the checkpoint at which a branch begins: that of the given step, or else the newest one.

    Its checksums are verified later, when it is taken over.

    Raises:
        ValueError: The run has no such checkpoint.
    """
    folder = run_folder(config)
    assert config.branch_from is not None
    _, step = parse_branch(config.branch_from)
    found = layout.checkpoints(folder / "checkpoints")
    if step is None:
        if found:
            return found[0]
        raise ValueError(f"branch_from={config.branch_from}: {folder} has no checkpoint; let it save one first.")
    chosen = next((one for one in found if layout.step_of(one) == step), None)
    if chosen is None:
        steps = ", ".join(str(layout.step_of(one)) for one in reversed(found)) or "none"
        raise ValueError(
            f"branch_from={config.branch_from}: {folder} keeps no checkpoint of step {step} (kept: {steps}); name one of "
            "these, or keep it in the run from the start by trainer.keep_steps."
        )
    return chosen


def check_branch(config: Config, plan: RunPlan) -> Branch:
    """Check that a run can branch from the checkpoint of `branch_from`, and return the branch.

    Args:
        config: The configuration of the new run.
        plan: The plan made from it.

    Raises:
        ValueError: Something does not fit; the message names it and the remedy.
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
    if plan.num_steps <= step:
        raise ValueError(
            f"{where} begins at step {step} and the run has {plan.num_steps}: set trainer.max_steps above {step}."
        )
    _check_pruned(where, step, state["sparsity"], plan)
    inner = read_branch(parent)
    return Branch(
        run=str(parent),
        step=step,
        trunk=inner.trunk if inner else str(parent.resolve()),
        changes=tuple(f"{key} was {old}, is {new}" for key, (old, new) in changes.items()),
        is_sparse=state["sparsity"] is not None,
    )


def check_steps_alike(config: Config, branch: Branch, identity: Mapping[str, Any]) -> None:
    """Refuse another batch size or sequence length than the checkpoint's: a step would be another number of tokens.

    Args:
        config: The configuration of the new run.
        branch: The point at which it branches.
        identity: The settings of the new run that must match for a checkpoint to be resumed.

    Raises:
        ValueError: They differ; the message names both values.
    """
    folder = layout.folder_of(Path(branch.run) / "checkpoints", branch.step)
    before = json.loads((folder / layout.STATE).read_text(encoding="utf-8"))["identity"]
    for key in ("batch_size", "sequence_length"):
        if before[key] != identity[key]:
            raise ValueError(
                f"branch_from={config.branch_from} has {key}={before[key]} and this run {key}={identity[key]}: a branch keeps "
                "it, since its steps go on from there."
            )


def _check_pruned(where: str, step: int, saved: Mapping[str, Any] | None, plan: RunPlan) -> None:
    """Refuse a schedule that would have pruned more weights by this step than the other run has."""
    if plan.schedule is None:
        return
    counts = plan.scope.counts(plan.pools, plan.schedule.base, step - 1)
    for pool, wanted in zip(plan.pools, counts, strict=True):
        found = 0 if saved is None else pool.numel - sum(saved["kept"][name] for name in pool.names)
        if wanted > found:
            raise ValueError(
                f"{where} has {found:,} of {pool.numel:,} weights pruned at step {step:,}, where this schedule has pruned "
                f"{wanted:,}: begin the window at step {step} or later."
            )


def _plain(config: Any) -> dict[str, Any]:
    merged: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), config))
    # A null tokenizer means one of these, and a run saves which one it used.
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
    # The values of the group optim are copied into the group trainer, and only those count.
    names = [name for name in {**before, **now} if not name.startswith("optim.")]
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
