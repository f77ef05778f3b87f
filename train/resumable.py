"""A `transformers.Trainer` that writes and reads our checkpoints in place of its own.

The Trainer decides when to save; `train.checkpoints.write` and `train.checkpoints.read` define the format.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from sparsity import SparsityCallback
from train.checkpoints import layout
from train.checkpoints.background import BackgroundWriter
from train.checkpoints.contents import buffers_of, optimizer_figures, parameters_of, rank_tensors
from train.checkpoints.rates import keeps_rates, load_rates
from train.checkpoints.read import CheckpointReader, load_buffers, load_masks, load_optimizer, load_weights
from train.checkpoints.rng import rng_state, set_rng_state
from train.checkpoints.write import Checkpoint, write_checkpoint
from train.distributed import World, set_group_timeouts
from train.faults.guard import StepGuard
from train.faults.stop import RunStopped
from train.losses import StepLosses
from train.pruning import RunSparsity
from train.speed.throughput import StepClock


@dataclass
class RunState:
    """The state of a run that its checkpoints save in addition to the Trainer's, and how they are saved."""

    identity: dict[str, Any]
    """The settings that must match for a checkpoint to be resumed; they are compared when it is loaded."""
    carried: dict[str, Any] = field(default_factory=dict)
    """Plain data that is saved in every checkpoint: the data's fingerprint, the tokenizer."""
    branch_step: int | None = None
    """The step of a checkpoint that came from another run; its schedule and learning rates are not loaded."""
    keep_steps: tuple[int, ...] = ()
    """The steps whose checkpoints are never removed."""
    before_save: Callable[[], None] = lambda: None
    """Called on rank 0 before a checkpoint is written, so that no earlier record is lost."""


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold all that its run needs to resume on any number of ranks.

    Args:
        world: This process and its peers.
        sparsity: The run's sparsity callback, if it has one.
        run_state: The state of the run that checkpoints save in addition to the Trainer's.
        guard: Skips bad updates, and decides when to stop.
        clock: The timer of the training steps, which pauses while a checkpoint is written.
        async_save: Write checkpoints in the background.
        kwargs: The arguments of a Trainer.
    """

    def __init__(
        self,
        *,
        world: World,
        sparsity: SparsityCallback | None,
        run_state: RunState,
        guard: StepGuard,
        clock: StepClock,
        async_save: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        set_group_timeouts(world, self.args.ddp_timeout)
        self.world = world
        self.sparsity = sparsity
        self.run_state = run_state
        self.guard = guard
        self.clock = clock
        self.add_callback(guard)
        self._background = BackgroundWriter(world, self.args.ddp_timeout) if async_save else None
        if self._background is not None:
            guard.has_save_failed = self._background.has_failed
        self.train_seconds = 0.0
        """Seconds of training, including those before a resume."""
        self.earlier_seconds = 0.0
        """Seconds of training before the checkpoint that this process resumed."""
        self._since = 0.0
        self._losses = StepLosses(self.args.max_steps, world)
        self._last_logged_step = 0

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written in the background, if any, and raise its error."""
        if self._background is not None:
            self._background.wait()

    def _count_time(self) -> None:
        now = time.monotonic()
        self.train_seconds, self._since = self.train_seconds + now - self._since, now

    def step_losses(self) -> Tensor:
        """Return the training loss of each step so far, averaged over all ranks [num_steps].

        Collective: every rank calls it.
        """
        return self._losses.averaged(self.state.global_step)

    # --- writing ---

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint of this step and remove those beyond `save_total_limit`. Every rank calls it."""
        with self.clock.pause():
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        self.guard.read_late_flags()
        shards = self.sparsity.shards if self.sparsity else []
        tensors, pieces, scalars = rank_tensors(self._module, self.optimizer, shards, rng_state(), self.world.rank)
        losses = self.step_losses()
        if self.world.is_main:
            tensors["losses"] = losses
        self._count_time()
        assert self.lr_scheduler is not None
        root, step = Path(str(self.args.output_dir)), self.state.global_step
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "identity": self.run_state.identity,
            "carried": self.run_state.carried,
            "shapes": {name: list(param.shape) for name, param in parameters_of(self._module).items()},
            "optimizer": {"scalars": scalars, **optimizer_figures(self.optimizer, parameters_of(self._module))},
            "scheduler": {
                name: value for name, value in self.lr_scheduler.state_dict().items() if name != "lr_lambdas"
            },
            "scaler": scaler.state_dict() if scaler is not None else None,
            "sparsity": self.sparsity.state() if self.sparsity else None,
            "num_skipped": self.guard.num_skipped,
            "last_logged_step": self._last_logged_step,
            "train_seconds": self.train_seconds,
        }
        write = write_checkpoint if self._background is None else self._background.write_checkpoint
        write(
            Checkpoint(
                root,
                step,
                self.world,
                tensors,
                pieces,
                state,
                self.state.save_to_json,
                before=self.run_state.before_save,
                after=lambda: layout.remove_old(root, self.args.save_total_limit or 1, step, self.run_state.keep_steps),
            )
        )

    # --- reading ---

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: weights and moments are loaded together later, into the shards that `prepare` makes."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load weights, moments, learning rates and losses, and load and check the masks.

        Every rank calls it, and a mismatch raises RunStopped on all of them.
        """
        if checkpoint is None:
            return
        try:
            self._load(CheckpointReader(Path(checkpoint)))
        except ValueError as error:
            raise RunStopped(str(error)) from error

    def _load(self, reader: CheckpointReader) -> None:
        state, parameters = reader.state, parameters_of(self._module)
        load_weights(reader, parameters)
        load_buffers(reader, buffers_of(self._module))
        branches = reader.step == self.run_state.branch_step
        rates = keeps_rates(self.lr_scheduler, state["scheduler"], branches)
        load_optimizer(reader, self.optimizer, parameters, rates)
        load_rates(self.lr_scheduler, state["scheduler"], reader.step, branches)
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        losses = reader.tensor("losses", 0)
        assert losses is not None
        self._losses.load(losses)
        self.guard.num_skipped = state["num_skipped"]
        self._last_logged_step = state["last_logged_step"]
        self.earlier_seconds = self.train_seconds = state["train_seconds"]
        if self.sparsity is not None:
            self.sparsity.bind(self._module)
            if state["sparsity"] is not None:
                load_masks(reader, self.sparsity.shards, lambda name: row_size(parameters[name]))
            if branches:
                assert isinstance(self.sparsity, RunSparsity)
                self.sparsity.carry_over(state["sparsity"], reader.step)
                return
            if state["sparsity"] is None:
                raise ValueError(
                    f"{reader.folder} was written by a dense run, but this run is sparse: set overwrite=true to start "
                    "over."
                )
            self.sparsity.load_state(state["sparsity"], reader.step)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the scaler is loaded with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this rank's random generators; ranks that did not exist before keep their seeded generators."""
        if checkpoint is None:
            return
        reader = CheckpointReader(Path(checkpoint))
        if self.world.rank < reader.state["world_size"]:
            names = ("torch", "python", "numpy", "cuda")
            found = {name: reader.tensor(f"rng/{name}", self.world.rank) for name in names}
            set_rng_state({name: value for name, value in found.items() if value is not None})


def row_size(param: Tensor) -> int:
    """Return the number of weights in a row of a parameter."""
    return param.numel() // param.shape[0] if param.shape[0] else 1
