"""The start of a run: a checkpoint, the weights of `init_from`, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from conf.cli import user_errors
from conf.schema import Config
from sparsity import prunable_parameters
from sparsity.mixed import schedule_record
from train.branch import begin_branch
from train.checkpoints.resume import checkpoint_to_resume, data_fingerprint
from train.data import PreparedData
from train.distributed import World
from train.model.build import build_skeleton
from train.model.initial import initial_weights
from train.model.initial_check import check_start, check_tokenizer, command_line
from train.model.weights import draw_weights
from train.plan.branch import Branch
from train.plan.folders import is_at_hand
from train.plan.run import RunPlan
from train.record.directory import RunDirectory


@dataclass(frozen=True)
class Start:
    """The start of a run: a checkpoint to resume, or a function that fills the model."""

    checkpoint: Path | None
    fill: Callable[[nn.Module], Any]
    """The function that fills the model with its first weights; it does nothing if a checkpoint has them."""
    prunable: tuple[str, ...]
    """The names of the weights that may be pruned."""
    sparsity: float
    """The share of pruned weights at the branch, or of zeros in the prunable weights of `init_from`."""
    fingerprint: dict[str, Any]
    """The fingerprint of the data, which is compared when the run is resumed."""
    branch: Branch | None = None
    """The branch point, if the run branches from another one."""

    @property
    def branch_step(self) -> int | None:
        """The step of the checkpoint that was taken over from another run."""
        return None if self.branch is None else self.branch.step


def find_start(
    config: Config, plan: RunPlan, directory: RunDirectory, data: PreparedData, model: Any, tokenizer: Any, world: World
) -> Start:
    """Find the checkpoint to resume, or the weights with which to begin.

    Collective: every rank calls it.

    Raises:
        RunStopped: On every rank, if there are checkpoints but all are damaged.
        SystemExit: On every rank, if the checkpoint belongs to other settings, or its data has changed.
    """
    with user_errors(quiet=not world.is_main):
        prunable = tuple(prunable_parameters(model, config.sparsity.include, config.sparsity.requires_dense))
    fingerprint = world.on_main(data_fingerprint, data.folder)
    branch = world.on_main(begin_branch, config, plan, directory, data.folder, data.tokenizer)
    branch_step = None if branch is None else branch.step
    checkpoint = checkpoint_to_resume(directory.checkpoints, identity(plan), data.folder, world, branch_step)
    with user_errors(quiet=not world.is_main):
        fill = filling(config, plan, model, tokenizer, checkpoint)
        sparsity = world.on_main(inherited_sparsity, config, model, prunable)
    if branch is not None and branch.past is not None:
        sparsity = 1.0 - branch.past.density
    return Start(checkpoint, fill, prunable, sparsity, fingerprint, branch)


def check_beginning(config: Config, plan: RunPlan, directory: RunDirectory) -> None:
    """Check that `init_from` or `branch_from` fits, if the run has not begun yet.

    Raises:
        ValueError: It does not fit.
    """
    if not directory.config.exists():
        check_start(config, plan, command_line())
        check_tokenizer(config, command_line())


def filling(
    config: Config, plan: RunPlan, model: Any, tokenizer: Any, resume_from: Path | None
) -> Callable[[nn.Module], Any]:
    """Return the function that fills the model with its first weights; it does nothing if a checkpoint is resumed.

    Raises:
        ValueError: `init_from` does not hold the configured model.
    """
    if resume_from is not None:
        return lambda module: None
    if config.init_from is not None:
        weights = initial_weights(model, config.init_from, plan.model.path is not None)
        return weights.fill
    seed, init = config.trainer.seed, plan.model.init
    return lambda module: draw_weights(module, build_skeleton(plan.model, tokenizer), seed, init)


def inherited_sparsity(config: Config, model: Any, prunable: Iterable[str]) -> float:
    """Return the share of zeros in the prunable weights of `init_from`; 0 if that folder no longer exists."""
    if config.init_from is None or not is_at_hand(config.init_from):
        return 0.0
    return initial_weights(model, config.init_from, config.model.path is not None).zero_share(prunable)


def identity(plan: RunPlan) -> dict[str, Any]:
    """Return the settings that must match for a checkpoint to be resumed."""
    return {
        "batch_size": plan.batch_size,
        "sequence_length": plan.sequence_length,
        "num_steps": plan.num_steps,
        "schedule": schedule_record(plan.schedule) if plan.schedule else None,
    }
