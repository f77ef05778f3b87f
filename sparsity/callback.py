"""SparsityCallback: *when* weights are pruned, inside any `transformers.Trainer`: one process, DDP, FSDP2 or HSDP."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsity.order import move_to_the_end
from sparsity.pruner import Pruner
from sparsity.resume import STATE_KEY, masks_from_weights, surviving_zeros
from sparsity.schedule import Schedule
from sparsity.wrappers import check_weights_are_in_reach


class SparsityCallback(Pruner, TrainerCallback):
    """Prunes the smallest weights before the steps that the schedule names, and keeps them at exactly 0.

    `choices` are those of `Pruner`: scope, groups, pattern, score, factors, seed, include, requires_dense. With
    `keep_zeros` a run that starts from a sparse model keeps its zeros, and events prune only beyond them; with `Fixed()`
    as schedule that is all. Figures go into the Trainer's log history and, with `report` and a running wandb run, to
    wandb. Draws from no global random generator and leaves survivors untouched: with a sparsity of 0 a run equals one
    without the callback to the last bit.

    It makes itself the last of the Trainer's callbacks, so that what another one writes into pruned weights is 0 again
    before it is evaluated, saved or left at the end. A Trainer takes one of them.

    Every rank runs it alike; an event's collectives sum counts over the shard group and compare a hash over replicas.
    """

    def __init__(self, schedule: Schedule, *, report: bool = True, keep_zeros: bool = False, **choices: Any) -> None:
        super().__init__(schedule, **choices)
        self.report = report
        self.keep_zeros = keep_zeros or not self._events
        self._density_sum = 0.0
        self._num_steps = 0
        self._is_loaded = False

    @property
    def average_density(self) -> float:
        """Mean density over the steps run so far."""
        return self._density_sum / self._num_steps if self._num_steps else 1.0

    def metrics(self, step: int) -> dict[str, float]:
        """The figures to log while `step` is the last step that ran."""
        figures = {
            "sparsity/density": self.density,
            "sparsity/target_density": self.target_density(step),
            "sparsity/average_density": self.average_density,
            "sparsity/nonzero_linear_params": float(sum(self.kept.values())),
        }
        return figures if self.threshold is None else {**figures, "sparsity/threshold": self.threshold}

    def bind(self, model: nn.Module) -> None:
        super().bind(model)
        self._density_sum, self._num_steps = 0.0, 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(state, "_has_sparsity_callback", False):
            raise ValueError(
                "This Trainer has two SparsityCallbacks, which would share one state and one density: give one of them all "
                "that is to be pruned, with groups=[...] for targets of their own."
            )
        # Each train() makes a new TrainerState, and only its fields are saved.
        state._has_sparsity_callback = True  # type: ignore[attr-defined]
        move_to_the_end(self)
        assert model is not None
        check_weights_are_in_reach(model, args)
        if self._is_loaded:
            self._is_loaded = False
            return
        if self._events and max(self._events) > state.max_steps - 1:
            raise ValueError(
                f"The prune window ends at step {max(self._events)}, outside a run of {state.max_steps} steps: end the "
                "window earlier or train longer."
            )
        if self._events and args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True would bring back the weights of a checkpoint before the last prune event: set it "
                "to False, and load the checkpoint you want yourself."
            )
        self.bind(model)
        if state.global_step > 0:
            self._restore(state.global_step, state.stateful_callbacks.get(STATE_KEY))  # type: ignore[union-attr]
            return
        self.check_adapters()
        if self.keep_zeros:
            self.inherit()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step in self._events:
            self.prune_at(state.global_step, optimizer)
        self._density_sum += self.density
        self._num_steps += 1

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.after_update(optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._before_others_look(state, control, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._before_others_look(state, control, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.report or not self._num_steps:
            return
        figures = self.metrics(max(0, state.global_step - 1))
        if state.log_history:
            state.log_history[-1].update(figures)
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and state.is_world_process_zero:
            wandb.log({**figures, "train/global_step": state.global_step})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._zero_again(model)
        self.unbind()

    # --- checkpoints that carry masks ---

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the masks of `shards`: plain numbers, the same on every rank."""
        return {
            "density_sum": self._density_sum,
            "num_steps": self._num_steps,
            "threshold": self.threshold,
            "inherited": dict(self.inherited),
            "kept": dict(self.kept),
        }

    def load_state(self, state: dict[str, Any], global_step: int) -> None:
        """Go on at `global_step` from `state`, once `bind` was called and the saved masks were written into `shards`.

        A ValueError says what disagrees, see `check_masks`. The next on_train_begin then leaves everything as it is.
        Collective.
        """
        self.check_masks(state["kept"], state["inherited"], global_step)
        self.threshold = state["threshold"]
        self._density_sum, self._num_steps = state["density_sum"], state["num_steps"]
        self._is_loaded = True

    def _before_others_look(self, state: TrainerState, control: TrainerControl, model: nn.Module | None) -> None:
        """Re-zero pruned weights before evaluating, saving or stopping, whoever wrote to them."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._zero_again(model)
        self._leave_state(state, control)

    def _zero_again(self, model: nn.Module | None) -> None:
        if model is not None:
            self.follow(model)
        self.zero_pruned()

    def _leave_state(self, state: TrainerState, control: TrainerControl) -> None:
        """Put what tells masks from zeros into the state that the Trainer saves with its checkpoint. Collective."""
        if not control.should_save:
            return
        self._refresh()
        surviving = surviving_zeros(self._shards, self._layout) if self.density < 1 else {}
        assert isinstance(state.stateful_callbacks, dict)
        state.stateful_callbacks[STATE_KEY] = {**self.state(), "step": state.global_step, "surviving_zeros": surviving}

    def _restore(self, global_step: int, saved: dict[str, Any] | None) -> None:
        """Take the masks of a resumed run from its zeros, and refuse weights that are not as sparse as they must be.

        `saved` is what `_leave_state` left. Without it every zero is a pruned weight, and their number must be the
        schedule's.
        """
        if saved is not None and saved["step"] == global_step:
            if sum(saved["kept"].values()) < self.num_prunable:
                masks_from_weights(self._shards, saved["surviving_zeros"] or {})
            self.load_state(saved, global_step)
            self._is_loaded = False
            return
        self.check_zeros(global_step, more=self.keep_zeros)
        if self.keep_zeros:
            self.note_inherited()
        self._num_steps = global_step
        average = self.overall.average_density(global_step) if self._events else self.density
        self._density_sum = average * global_step
