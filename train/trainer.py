"""A `transformers.Trainer` for packed blocks: the series' recipe, the loss of every step, and our checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from sparsity import SparsityCallback
from sparsity.mask import state_holder
from train.clipping import clip_replicas_alike_, has_replicas
from train.data.mixture import MixtureBlocks
from train.data.sampler import PermutationSampler
from train.distributed import World, check_fsdp2, check_ranks_gather_alike, reduce_in_float32
from train.faults.guard import StepGuard, skips_on_device
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import start_unheeding
from train.faults.stop import RunStopped
from train.model.attention import attend_over_whole_blocks, attend_within_documents
from train.model.weights import shard_and_allocate
from train.muon import check_not_offloaded, make_muon
from train.resumable import ResumableTrainer, RunState
from train.speed.throughput import StepClock


class KeepSteps(TrainerCallback):
    """A callback that saves a checkpoint at each of `steps`, in addition to those that the Trainer saves."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask the Trainer to save after one of the steps."""
        control.should_save |= state.global_step in self.steps
        return control


class PretrainingTrainer(ResumableTrainer):
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
        super().__init__(
            world=world,
            sparsity=sparsity,
            run_state=run_state,
            guard=guard,
            clock=clock or StepClock(world.device, is_read=False),
            async_save=async_save,
            **kwargs,
        )
        attend = attend_within_documents if by_document else attend_over_whole_blocks
        attend(cast(PreTrainedModel, self.model))
        check_fsdp2(self.accelerator)
        if uses_muon:
            check_not_offloaded(self.accelerator)
        reduce_in_float32(self.accelerator)
        check_ranks_gather_alike(world, self.accelerator)
        self.evaluator = evaluator
        self.heartbeat = heartbeat
        self.batch_size = batch_size
        self.uses_muon = uses_muon
        self.fill = fill
        """Fills a sharded skeleton with its weights; None for a model that already has them."""
        # Counting the predicted tokens of a step costs a small gather; packed blocks all have the same number.
        self.model_accepts_loss_kwargs = self.args.average_tokens_across_devices = by_document
        self.evaluated_step = -1
        """The step after which the model was last evaluated."""
        self._sampler: PermutationSampler | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end. If the guard stops the run earlier, save a checkpoint, then raise RunStopped.

        Collective: every rank calls it.
        """
        self._since = time.monotonic()
        self.guard.preemption.at_step_ends = True
        try:
            result = super().train(*args, **kwargs)
        except RunStopped:
            self._finish_saving()
            raise
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
        """Return all parameters' names, norms and embeddings included."""
        return [name for name, _ in model.named_parameters()]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch, and keep its loss on the device."""
        self.heartbeat.beat(self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.add(self.state.global_step, loss)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch a step's micro-batches, and measure how long the step waits for them."""
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
        """Return a loader whose workers ignore the signals that ask the run to stop."""
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
