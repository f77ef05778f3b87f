"""The sparsity callback of a run, made from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from conf.schema import Config
from sparsity import SparsityCallback
from sparsity.schedule import Fixed
from train.faults.stop import RunStopped
from train.plan.branch import Branch
from train.plan.names import pruned_groups
from train.plan.run import RunPlan
from train.speed.throughput import StepClock


class RunSparsity(SparsityCallback):
    """A SparsityCallback that turns a mismatch with the model or checkpoint into RunStopped on all ranks.

    It pauses `clock` while it prunes, so that pruning does not count as step time.
    """

    clock = StepClock(torch.device("cpu"), is_read=False)
    way_on = "begin another run with branch_from=RUN@{step} and that change"

    def prune_at(self, *args: Any, **kwargs: Any) -> Any:
        """Change the masks before a step while the clock pauses."""
        with self.clock.pause():
            return super().prune_at(*args, **kwargs)

    def calibrate(self, *args: Any, **kwargs: Any) -> Any:
        """Collect activation norms while the clock pauses."""
        with self.clock.pause():
            return super().calibrate(*args, **kwargs)

    def carry_over(self, saved: dict[str, Any] | None, step: int) -> None:
        """Take over the masks and the average density of another run at `step`.

        If this run's schedule would have pruned fewer weights by then, the additional zeros are kept too. Parameters that
        only the other run pruned are trained densely from here on.

        Collective: every rank calls it.

        Args:
            saved: The other run's state; None if it was dense.
            step: The step that this run begins with.
        """
        numels = {shard.name: shard.full_numel for shard in self.shards}
        if saved is None:
            saved = {"density_sum": float(step), "num_steps": step, "threshold": None, "inherited": {}, "kept": numels}
        kept = {name: saved["kept"][name] for name in numels}
        try:
            self.load_state({**saved, "kept": kept}, step)
        except ValueError:
            if self.pruner.choices.update.lets_return:
                raise
            zeros = {name: numel - kept[name] for name, numel in numels.items()}
            self.load_state({**saved, "kept": kept, "inherited": zeros}, step)
        self._is_new = True

    def move_at(self, *args: Any, **kwargs: Any) -> Any:
        """Move the masks while the clock pauses."""
        with self.clock.pause():
            return super().move_at(*args, **kwargs)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Bind the pruner; end the run on all ranks if it does not fit the model or checkpoint."""
        with _stopping():
            super().on_train_begin(*args, **kwargs)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Run the event before a step; end the run on all ranks if it cannot be done."""
        with _stopping():
            super().on_step_begin(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Zero pruned weights a last time; end the run on all ranks if its calibration was refused."""
        with _stopping():
            super().on_train_end(*args, **kwargs)


@contextmanager
def _stopping() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RunStopped(str(error)) from error


def sparsity_callback(config: Config, plan: RunPlan, branch: Branch | None = None) -> RunSparsity | None:
    """Return the callback of a run that is sparse or may start from zeros, else None.

    Its own reports are off, because the Recorder reports its figures.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        branch: The point at which the run branched, if it did.
    """
    sparsity = config.sparsity
    keep_zeros = config.init_from is not None
    patterns: Any = {"include": sparsity.include, "requires_dense": sparsity.requires_dense}
    if plan.schedule is None:
        has_masks = keep_zeros or (branch is not None and branch.is_sparse)
        return RunSparsity(Fixed(), report=False, **patterns) if has_masks else None
    return RunSparsity(
        plan.schedule.base,
        keep_zeros=keep_zeros,
        score=sparsity.score,
        factors=sparsity.factors,
        normalize=sparsity.normalize,
        scope=sparsity.scope,
        groups=pruned_groups(sparsity),
        pattern=sparsity.pattern,
        update=sparsity.make_update(),
        seed=config.trainer.seed,
        calibration=sparsity.calibration,
        report=False,
        **patterns,
    )
