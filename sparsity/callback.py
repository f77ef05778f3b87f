"""SparsityCallback prunes inside any `transformers.Trainer`: in one process, or under DDP, FSDP2 or HSDP."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from sparsity.arguments import check_flag
from sparsity.event.activations import calibration_of
from sparsity.order import move_to_the_end
from sparsity.pruner import Pruner
from sparsity.resume import STATE_KEY, check_masks, check_zeros, restore_from_weights, state_for_trainer
from sparsity.rules import rule_for
from sparsity.schedule import Schedule
from sparsity.tracked import TrackedPruner
from sparsity.wrappers import check_run, check_weights_are_in_reach


class SparsityCallback(TrackedPruner, TrainerCallback):
    """A Trainer callback that prunes the smallest weights before the steps of a schedule and keeps them at exactly 0.

    Its `pruner` holds the masks; the callback decides when the pruner acts. It uses no global random generator and does not
    touch surviving weights: with a sparsity of 0, a run equals one without the callback to the last bit. The callback moves
    itself to the end of the Trainer's callbacks. If another callback writes into pruned weights, they are therefore set to 0
    again before the model is evaluated, saved or returned. A Trainer accepts only one SparsityCallback.

    Collective: all ranks must call it in the same way. An event sums counts over the shard group and compares a hash of the
    masks over replicas.

    Args:
        schedule: The share of weights to keep at each step, such as `Geometric`; `Fixed()` only keeps the model's zeros.
        report: Add the figures to the Trainer's log history, and to wandb if a run is open there.
        keep_zeros: Keep the zeros of a model that is already sparse; events then prune further weights.
        choices: The other arguments of `sparsity.choices.Choices`: scope, groups, pattern, score, factors and so on.

    Raises:
        ValueError: Some choices cannot be combined; the message names them.
    """

    way_on = "resume from the checkpoint of step {step} with that change"
    """The remedy that a run names if it stops because its calibration failed; {step} is the step of its checkpoint."""

    def __init__(self, schedule: Schedule, *, report: bool = True, keep_zeros: bool = False, **choices: Any) -> None:
        check_flag("report", report)
        check_flag("keep_zeros", keep_zeros)
        super().__init__(Pruner(schedule, **choices))
        self.rule = rule_for(self.pruner)
        self.report = report
        self.keep_zeros = keep_zeros or not self.pruner.events
        self._is_loaded = False
        self._is_new = True
        """True if training begins, rather than resumes."""
        self._calibrated_step = -1
        self._refusal: ValueError | None = None
        """The error of the calibration before the next event; None if it has not failed."""
        if keep_zeros and self.pruner.choices.update.lets_return:
            raise ValueError(
                f"keep_zeros=True keeps the zeros of a sparse model, but update={self.pruner.choices.update.name} lets "
                "pruned weights return: start from a dense model, or use update=shrink."
            )

    # --- a run ---

    def bind(self, model: nn.Module) -> None:
        """Bind the pruner to a prepared model and count steps from 0."""
        self.pruner.bind(model)
        self._is_new, self._calibrated_step = True, -1
        self._density_sum, self._num_steps = 0.0, 0

    def prune_at(self, step: int, optimizer: Any = None) -> None:
        """Change the masks before `step` runs.

        Collective: over all ranks.
        """
        self.rule.act(step, optimizer)

    def calibrate(self, model: nn.Module, loader: Any, device: torch.device | None = None) -> None:
        """Collect the activation norms that the score needs, on sequences of the training data.

        Collective: over all ranks.
        """
        self.pruner.calibrate(model, calibration_of(loader, self.pruner.choices.calibration), device)

    def _calibrate_once(self, step: int, model: nn.Module, loader: Any, args: Any) -> None:
        """Calibrate before `step`, unless that was done already. Every rank calls it."""
        if step != self._calibrated_step:
            self.calibrate(model, loader, getattr(args, "device", None))
            self._calibrated_step = step

    @property
    def _needs_activations(self) -> bool:
        return "activations" in self.pruner.choices.score.needs

    def move_at(self, step: int, optimizer: Any = None) -> None:
        """Move the masks by the gradients of `step`.

        Collective: over all ranks.
        """
        self.rule.move(step, optimizer)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Bind the pruner to the model, and restore or inherit its masks."""
        if getattr(state, "_has_sparsity_callback", False):
            raise ValueError(
                "This Trainer has two SparsityCallbacks, which would share one state and one density: use one for "
                "everything to be pruned, with groups=[...] for separate targets."
            )
        # Each train() makes a new TrainerState, and only its fields are saved.
        state._has_sparsity_callback = True  # type: ignore[attr-defined]
        move_to_the_end(self)
        check_weights_are_in_reach(model, args)
        self.rule.prepare(state.max_steps)
        if self._needs_activations:
            calibration_of(kwargs.get("train_dataloader"), 1)
        if self._is_loaded:
            self._is_loaded = False
            self.rule.check_restored(kwargs.get("optimizer"))
            self._try_calibration(args, state, model, kwargs.get("train_dataloader"))
            return
        check_run(self.pruner.events, args, state.max_steps)
        self.bind(model)
        if state.global_step > 0:
            self.restore(state.global_step, state.stateful_callbacks.get(STATE_KEY))  # type: ignore[union-attr]
            self.rule.check_restored(kwargs.get("optimizer"))
            return
        self.pruner.check_adapters()
        if self.keep_zeros:
            self.pruner.inherit()
        self._try_calibration(args, state, model, kwargs.get("train_dataloader"))

    def _try_calibration(self, args: Any, state: TrainerState, model: nn.Module, loader: Any) -> None:
        """Find out before the first step of a run whether each layer sees the calibration text. Every rank calls it."""
        if self._is_new and self._needs_activations:
            self._calibrate_once(state.global_step, model, loader, args)

    def on_step_begin(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Run the event before this step, if there is one, and add the step to the average density."""
        if self._needs_activations and self.rule.chooses_at(state.global_step):
            self._calibrate_once(state.global_step, model, train_dataloader, args)
        if self.rule.acts_before(state.global_step):
            self.prune_at(state.global_step, optimizer)
        self.rule.begin_step(state.global_step)
        self._density_sum += self.density
        self._num_steps += 1

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Move masks by the gradients of this step, if the update does so; such a step updates no weights."""
        if self.rule.moves_after_backward(state.global_step):
            self.move_at(state.global_step, optimizer)
            # Without gradients an optimizer updates neither weights nor its step counts.
            for param in model.parameters():
                param.grad = None
        self.rule.before_update(optimizer)

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Zero the weights that the optimizer's update has changed although they are pruned."""
        self.rule.after_update(optimizer)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Calibrate for an event before the next step, and save and stop if that fails. Zero pruned weights again before
        evaluating, saving or stopping, in case other code wrote to them."""
        step = state.global_step
        if self._needs_activations and not control.should_training_stop and self.rule.chooses_at(step):
            try:
                self._calibrate_once(step, model, kwargs.get("train_dataloader"), args)
            except ValueError as error:
                way_on = self.way_on.format(step=step)
                self._refusal = ValueError(f"Before step {step}, {str(error).removesuffix('.')}, and {way_on}.")
                control.should_save = control.should_training_stop = True
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._zero_again(model)
        if control.should_save:
            assert isinstance(state.stateful_callbacks, dict)
            saved = {**self.state(), **state_for_trainer(self.pruner, state.global_step)}
            state.stateful_callbacks[STATE_KEY] = saved

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Zero pruned weights a last time and stop masking gradients."""
        self._zero_again(model)
        self.pruner.unbind()
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Add the sparsity's figures to the Trainer's log and to an open wandb run, if `report` is set."""
        if not self.report or not self._num_steps:
            return
        figures = self.metrics(max(0, state.global_step - 1))
        if state.log_history:
            state.log_history[-1].update(figures)
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and state.is_world_process_zero:
            wandb.log({**figures, "train/global_step": state.global_step})

    def _zero_again(self, model: nn.Module | None) -> None:
        if model is not None:
            self.pruner.follow(model)
        self.pruner.zero_pruned()

    # --- checkpoints ---

    def load_state(self, state: Mapping[str, Any], global_step: int) -> None:
        """Resume at `global_step` from `state`, after `bind` and after the saved masks were written into `shards`.

        The next on_train_begin then skips binding and restoring.

        Collective: over the shard group.

        Raises:
            ValueError: The masks do not fit, see `sparsity.resume.check_masks`.
        """
        check_masks(self.pruner, state, global_step)
        self._density_sum, self._num_steps = state["density_sum"], state["num_steps"]
        self._is_loaded, self._is_new = True, False

    def restore(self, global_step: int, saved: Mapping[str, Any] | None) -> None:
        """Resume at `global_step` from a checkpoint that holds only weights, after `bind`.

        Collective: over the shard group.

        Args:
            global_step: The next step to train.
            saved: The state that `on_step_end` stored in the Trainer's state at that step. If None, every zero counts as a
                pruned weight, and the number of zeros must be the schedule's.

        Raises:
            ValueError: The number of zeros is not the one that the state or the schedule demands.
        """
        if saved is not None and saved["step"] == global_step:
            restore_from_weights(self.pruner, saved, global_step)
            self._density_sum, self._num_steps = saved["density_sum"], saved["num_steps"]
            return
        check_zeros(self.pruner, global_step, allow_more=self.keep_zeros)
        if self.keep_zeros:
            self.pruner.note_inherited()
        self._num_steps = global_step
        average = self.pruner.overall.average_density(global_step) if self.pruner.events else self.density
        self._density_sum = average * global_step
