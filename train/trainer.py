"""A `transformers.Trainer` for packed blocks: the series' recipe, the loss of every step, and our checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState

from sparsity import SparsityCallback
from sparsity.mask import state_holder
from train.checkpoints import layout
from train.checkpoints.background import BackgroundWriter
from train.checkpoints.read import CheckpointReader, load_buffers, load_masks, load_optimizer, load_weights
from train.checkpoints.rng import rng_state, set_rng_state
from train.checkpoints.write import (
    Checkpoint,
    buffers_of,
    optimizer_figures,
    parameters_of,
    rank_tensors,
    write_checkpoint,
)
from train.clipping import clip_replicas_alike_, has_replicas
from train.data.mixture import MixtureBlocks
from train.data.sampler import PermutationSampler
from train.distributed import World, check_fsdp2, check_ranks_gather_alike, reduce_in_float32, set_group_timeouts
from train.faults.guard import StepGuard, skips_on_device
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import start_unheeding
from train.faults.stop import RunStopped
from train.losses import StepLosses
from train.model.attention import attend_over_whole_blocks, attend_within_documents
from train.model.weights import shard_and_allocate
from train.muon import make_muon
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


class KeepSteps(TrainerCallback):
    """A callback that saves a checkpoint at each of `steps`, in addition to those that the Trainer saves."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_save |= state.global_step in self.steps
        return control


class PretrainingTrainer(Trainer):
    """A Trainer that decays every parameter, keeps each step's loss on the device, and writes our checkpoints.

    Blocks all have the same length, so the loss of a step is the mean of its micro-batches' losses. If documents are
    kept apart, their first tokens are not predicted; the loss of a step is then the mean over all predicted tokens of
    its micro-batches and ranks.
    """

    def __init__(
        self,
        *,
        world: World,
        evaluator: Callable[[nn.Module], dict[str, float]],
        sparsity: SparsityCallback | None,
        run_state: RunState,
        guard: StepGuard,
        heartbeat: Heartbeat,
        batch_size: int,
        fill: Callable[[nn.Module], Any] | None = None,
        clock: StepClock | None = None,
        async_save: bool = False,
        uses_muon: bool = False,
        by_document: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        attend = attend_within_documents if by_document else attend_over_whole_blocks
        attend(cast(PreTrainedModel, self.model))
        check_fsdp2(self.accelerator)
        reduce_in_float32(self.accelerator)
        set_group_timeouts(world, self.args.ddp_timeout)
        check_ranks_gather_alike(world, self.accelerator)
        self.world = world
        self.evaluator = evaluator
        self.sparsity = sparsity
        self.run_state = run_state
        self.guard = guard
        self.heartbeat = heartbeat
        self.clock = clock or StepClock(world.device, is_read=False)
        self.add_callback(guard)
        self._background = BackgroundWriter(world, self.args.ddp_timeout) if async_save else None
        if self._background is not None:
            guard.has_save_failed = self._background.has_failed
        self.batch_size = batch_size
        self.uses_muon = uses_muon
        self.fill = fill
        """Fills a sharded skeleton with its weights; None for a model that already has them."""
        # Counting the predicted tokens of a step costs a small gather; packed blocks all have the same number.
        self.model_accepts_loss_kwargs = self.args.average_tokens_across_devices = by_document
        self.train_seconds = 0.0
        """Seconds of training, including those before a resume."""
        self.earlier_seconds = 0.0
        """Seconds of training before the checkpoint that this process resumed."""
        self._since = 0.0
        self._losses = StepLosses(self.args.max_steps, world)
        self._last_logged_step = 0
        self.evaluated_step = -1
        """The step after which the model was last evaluated."""
        self._sampler: PermutationSampler | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end. If the guard stops the run earlier, save a checkpoint, then raise RunStopped.

        Collective: every rank calls it.
        """
        self._since = time.monotonic()
        self.guard.preemption.at_step_ends = True
        result = super().train(*args, **kwargs)
        self._count_time()
        self._finish_saving()
        if self.guard.stop is None:
            self.guard.preemption.at_step_ends = False
            if self.guard.is_asked_to_stop():
                # The signal came after the last step, in which the ranks agreed to continue.
                self._save_checkpoint(self._module)
                self._finish_saving()
        if self.guard.stop is not None:
            raise self.guard.stop
        return result

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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Shard a model that has no weights, fill its shards, and create the optimizer for them.

        Collective: every rank calls it.
        """
        if self.fill is not None:
            shard_and_allocate(self.accelerator, self._module)
            self.fill(self._module)
            self.fill = None
        if self.uses_muon and self.optimizer is None:
            self.optimizer = make_muon(self._module, self.args)
            return self.optimizer
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.heartbeat.beat(self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.add(self.state.global_step, loss)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.wait_for_data():
            return super().get_batch_samples(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients and return their norm; all replicas clip by the same factor. Every rank calls it."""
        if not has_replicas(model.parameters()):
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_replicas_alike_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm; if it or the loss is not finite, drop the gradients so that no update is made."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A loss scaler handles infinite gradients itself: it skips the update and lowers the scale.
        scaler = getattr(self.accelerator, "scaler", None)
        norm, loss = None if scaler is not None else grad_norm, self._losses.latest(self.state.global_step)
        optimizer = state_holder(self.optimizer)
        if scaler is None and skips_on_device(optimizer):
            self.guard.decide_on_device(optimizer, loss, norm)
        elif not self.guard.allows_update(loss, norm):
            optimizer.zero_grad()
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures with the mean loss since the last logged step, even if the run was resumed in between.

        Collective: every rank calls it.
        """
        if "loss" in logs:
            self.guard.read_late_flags()
            losses = self.step_losses()[self._last_logged_step :]
            logs["loss"] = float(losses[losses.isfinite()].mean())
            logs["skipped_steps"] = self.guard.num_skipped
            self._last_logged_step = self.state.global_step
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        blocks: Any = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(blocks, MixtureBlocks):
            self._sampler = blocks.sampler(self.batch_size)
        else:
            self._sampler = PermutationSampler(len(blocks), seed=seed, batch_size=self.batch_size)
        return self._sampler

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)
        base.worker_init_fn = partial(start_unheeding, base.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, or nothing if a resumed run has no step left: the Trainer would run one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # Otherwise the Trainer would keep the save and log intervals of the command that wrote the checkpoint.
        self.state.compute_steps(self.args, self.state.max_steps)
        assert self._sampler is not None
        # accelerate does not pass the epoch on to the sampler when it skips batches.
        self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return held-out figures, computed by the same function as in `python -m eval`.

        Collective: every rank calls it.
        """
        with self.clock.pause():
            found = self.evaluator(self.model_wrapped)
        self.evaluated_step = self.state.global_step
        figures = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(figures))
        return figures

    def store_flos(self) -> None:
        """Do nothing: the plan knows the run's FLOPs, and counting them here would need a gather at every log."""

    # --- checkpoints: the Trainer decides when to save; `train.checkpoints.write` and `.read` define the format ---

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

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
        load_optimizer(reader, self.optimizer, parameters, rates=not branches)
        assert self.lr_scheduler is not None
        if branches:
            move_schedule_to(self.lr_scheduler, state["scheduler"]["last_epoch"])
        else:
            lambdas = [None] * len(state["scheduler"]["base_lrs"])
            self.lr_scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": lambdas})
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


def move_schedule_to(scheduler: Any, step: int) -> None:
    """Set a learning rate schedule to its rate after `step` steps, as if it had run them."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * at(step) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def row_size(param: Tensor) -> int:
    """Return the number of weights in a row of a parameter."""
    return param.numel() // param.shape[0] if param.shape[0] else 1
