"""The checkpoint of another run at which a branch begins: finding it, and checking the settings that must not change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.schema import Config
from conf.schema.trainer import OptimConfig
from sparsity.registry import name_of
from train.checkpoints import layout
from train.plan.branch import CONFIG, Branch, Past, parse_branch, read_branch, run_folder
from train.plan.rate import decay_start
from train.plan.run import RunPlan
from train.plan.settings import plain_settings

KEPT = ("init_from", "sparsity.include", "sparsity.requires_dense", "optim.optim")
"""Keys that a branch cannot change, in addition to the model, the batch size and the sequence length."""
NOT_CHANGES = (
    "branch_from", "run_name", "runs_dir", "sweep_name", "overwrite", "resume", "dry_run", "next_commands", "launch",
    "logger", "card",
)  # fmt: skip
DENSE_GRADIENT = "dense_gradient"
"""`sparsity.event.gradients.STATE`; importing it would import torch."""
TEXT_KEYS = tuple(
    f"data.{key}"
    for key in ("source", "path", "name", "subset", "split", "text_field", "sources", "max_documents", "heldout_share")
)
"""Keys that change the text, and so the tokenizer that is trained on it."""
RATE_KEYS = ("trainer.max_steps", "optim.decay_steps", "optim.lr_scheduler_type", "optim.lr_scheduler_kwargs")
"""Keys that determine when the learning rate begins to decay."""


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
        raise ValueError(
            f"branch_from={config.branch_from}: {folder} has no checkpoint yet: wait until that run has saved one."
        )
    chosen = next((one for one in found if layout.step_of(one) == step), None)
    if chosen is None:
        steps = ", ".join(str(layout.step_of(one)) for one in reversed(found)) or "none"
        raise ValueError(
            f"branch_from={config.branch_from}: {folder} has no checkpoint of step {step} (kept: {steps}): choose one of "
            "these, or set trainer.keep_steps when you start that run."
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
    where = f"branch_from={config.branch_from}"
    parent = run_folder(config)
    state = read_state(branch_checkpoint(config))
    before, now = _settings_of(where, parent), _plain(config)
    changes = _changes(before, now)
    step = int(state["step"])
    for key, (old, new) in changes.items():
        if key.startswith("model.") or key in KEPT:
            raise ValueError(
                f"{where}: {key} was {old} in that run and is {new} in this one, and a branch cannot change it: set "
                f"{key}={'null' if old is None else old}, or start a new run with init_from={parent}/model."
            )
    if plan.num_steps <= step:
        raise ValueError(
            f"{where} begins at step {step}, but the run has only {plan.num_steps} steps: set trainer.max_steps above "
            f"{step}."
        )
    check_steps_alike(where, state["identity"], plan)
    _check_tokenizer(where, changes, str(now["tokenizer"]), state["carried"].get("tokenizer"))
    _check_decay(where, step, changes, config, plan)
    _check_pruned(where, state, str(before["sparsity.update"]), plan)
    _check_gradient(where, state, plan)
    inner = read_branch(parent)
    return Branch(
        run=str(parent),
        step=step,
        trunk=inner.trunk if inner else str(parent.resolve()),
        changes=tuple(f"{key} was {old}, is {new}" for key, (old, new) in changes.items()),
        is_sparse=state["sparsity"] is not None,
        past=_past(state),
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state.json of another run's checkpoint.

    Raises:
        ValueError: It was removed meanwhile, is garbled, or has another version's format.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / layout.STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} was removed or is not complete: branch from another step.") from None
    except ValueError:
        raise ValueError(f"{checkpoint / layout.STATE} is garbled: branch from another step.") from None
    if state.get("format") != layout.FORMAT:
        raise ValueError(
            f"{checkpoint} has format {state.get('format')}, but this version reads {layout.FORMAT}: branch with the version "
            "that wrote it."
        )
    return state


def _past(state: Mapping[str, Any]) -> Past:
    step, sparsity = int(state["step"]), state["sparsity"]
    if sparsity is None:
        return Past(step, float(step), 0, 0)
    num_prunable = sum(math.prod(state["shapes"][name]) for name in sparsity["kept"])
    return Past(step, float(sparsity["density_sum"]), num_prunable, num_prunable - sum(sparsity["kept"].values()))


def with_past(config: Config, plan: RunPlan) -> RunPlan:
    """Return the plan of a branch with the steps of the other run; other plans are returned unchanged.

    Args:
        config: The configuration of the run, which has been checked.
        plan: The plan made from it.
    """
    if config.branch_from is None:
        return plan
    begun = read_branch(plan.run_dir) if (plan.run_dir / CONFIG).is_file() and not config.overwrite else None
    past = _past(read_state(branch_checkpoint(config))) if begun is None else begun.past
    return replace(plan, past=past)


def check_steps_alike(where: str, before: Mapping[str, Any], plan: RunPlan) -> None:
    """Refuse another batch size or sequence length than the checkpoint's: a step would be another number of tokens.

    Args:
        where: The name of the branch point, for the error.
        before: The checkpoint's settings that must match for it to be resumed.
        plan: The plan of the new run.

    Raises:
        ValueError: They differ; the message names both values.
    """
    for key, now in (("batch_size", plan.batch_size), ("sequence_length", plan.sequence_length)):
        if before[key] != now:
            name = "data.sequence_length" if key == "sequence_length" else key
            raise ValueError(
                f"{where} has {key}={before[key]} and this run has {key}={now}: a branch must keep it, because it continues "
                f"the other run's steps; set {name}={before[key]}."
            )


def _check_tokenizer(where: str, changes: Mapping[str, Any], now: str, before: str | None) -> None:
    """Refuse to train a tokenizer on other text, before the text is read: the embeddings are those of the other run's."""
    changed = next((key for key in changes if key in TEXT_KEYS), None)
    if now == "train" and before is not None and changed is not None:
        raise ValueError(
            f"{where} was trained with the tokenizer {before}, but with another {changed} and tokenizer=train this run would "
            f"train a new one: set tokenizer={before}."
        )


def _check_decay(where: str, step: int, changes: Mapping[str, Any], config: Config, plan: RunPlan) -> None:
    """Refuse a new schedule whose decay would have begun before the branch: the rate would jump."""
    begin = decay_start(config.trainer, plan.num_steps)
    if begin is not None and begin < step and any(key.startswith(RATE_KEYS) for key in changes):
        raise ValueError(
            f"{where} begins at step {step}, but in a run of {plan.num_steps} steps the decay begins at step {begin}, so that "
            f"the learning rate would jump: set optim.decay_steps to at most {plan.num_steps - step}, or raise "
            "trainer.max_steps."
        )


def _check_pruned(where: str, state: Mapping[str, Any], update: str, plan: RunPlan) -> None:
    """Refuse a schedule that does not fit the masks of the other run, whose sparsity.update was `update`."""
    if plan.schedule is None:
        return
    step, saved, returns = int(state["step"]), state["sparsity"], plan.update.lets_return
    counts = plan.scope.counts(plan.pools, plan.schedule.base, step - 1)
    for pool, wanted in zip(plan.pools, counts, strict=True):
        found = 0 if saved is None else pool.numel - sum(saved["kept"][name] for name in pool.names)
        if wanted > found:
            raise ValueError(
                f"{where} has pruned {found:,} of {pool.numel:,} weights by step {step:,}, but this schedule would have "
                f"pruned {wanted:,}: begin the window at step {step} or later."
            )
        if wanted < found and returns:
            raise ValueError(
                f"{where} has pruned {found:,} of {pool.numel:,} weights by step {step:,}, but this schedule only {wanted:,}, "
                f"and with sparsity.update={plan.update.name} the others would return: keep that run's target and window, or "
                "use sparsity.update=shrink."
            )
        if found and plan.update.gradients == "dense" and update != plan.update.name:
            raise ValueError(
                f"{where} has no values of its pruned weights, because its sparsity.update was {update}, but "
                f"sparsity.update={plan.update.name} trains them: use sparsity.update={update}, or branch before its window."
            )


def _check_gradient(where: str, state: Mapping[str, Any], plan: RunPlan) -> None:
    """Refuse an event at the branch itself if its score needs the gradient of a step that the other run has not kept."""
    if plan.schedule is None or "gradient" not in plan.score.needs or DENSE_GRADIENT in state["optimizer"]["states"]:
        return
    if (step := int(state["step"])) in plan.schedule.base.events():
        raise ValueError(
            f"{where} has not kept the gradient of step {step - 1}, which sparsity.score={name_of(plan.score)} needs for the "
            f"event before step {step}: begin the window at step {step + 1} or later."
        )


def _settings_of(where: str, parent: Path) -> dict[str, Any]:
    """Return the flat settings of the other run; a key that was added since has its default."""
    try:
        # OmegaConf's loader creates no objects from tags.
        return _plain(OmegaConf.load(parent / CONFIG))
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(
            f"{where}: {parent / CONFIG} is garbled or from another version: repair it, or branch with the version that "
            "wrote it."
        ) from None


def _plain(config: Any) -> dict[str, Any]:
    merged = plain_settings(config)
    # The values of the group optim are copied into the group trainer, and only those count.
    del merged["optim"]
    return {_typed(key): value for key, value in _flat(merged) if key.split(".")[0] not in NOT_CHANGES}


def _typed(key: str) -> str:
    """Return the name by which a user sets a key: those of the optimizer are in the group optim."""
    group, _, name = key.partition(".")
    return f"optim.{name}" if group == "trainer" and name.split(".")[0] in OptimConfig.__dataclass_fields__ else key


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = {**before, **now}
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
