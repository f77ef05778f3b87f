"""SparsityCallback: *when* weights are pruned, inside any `transformers.Trainer`: one process, DDP, FSDP2 or HSDP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsity.mask import (
    check_replicas_agree,
    count_kept,
    count_nonzero_pruned,
    make_shards,
    mask_gradients,
    masks_from_zeros,
    state_holder,
    zero_pruned_,
    zero_pruned_state_,
)
from sparsity.prunable import prunable_parameters
from sparsity.resume import STATE_KEY, masks_from_weights, surviving_zeros
from sparsity.schedule import Schedule
from sparsity.score import ScoreName, magnitude_of_key, score_named
from sparsity.select import prune_smallest_
from sparsity.shards import ParameterShard, RankLayout, local_values, rank_layout
from sparsity.wrappers import check_weights_are_in_reach


class SparsityCallback(TrainerCallback):
    """Prunes the globally smallest weights before the steps that the schedule names, and keeps them at exactly 0.

    `include` and `requires_dense` are name patterns, see `prunable_parameters`. With `keep_zeros` a run that starts from
    a sparse model keeps its zeros, and events prune only beyond them. Figures go into the Trainer's log
    history and, with `report` and a running wandb run, to wandb. Draws from no global random generator and leaves
    survivors untouched: with a sparsity of 0 a run equals one without the callback to the last bit.

    Every rank runs it alike; an event's collectives sum counts over the shard group and compare a hash over replicas.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        score: ScoreName = "magnitude",
        include: Sequence[str] | None = None,
        requires_dense: Sequence[str] = (),
        seed: int = 0,
        report: bool = True,
        keep_zeros: bool = False,
    ) -> None:
        self.schedule = schedule
        self.score = score_named(score, seed)
        self.include = include
        self.requires_dense = requires_dense
        self.report = report
        self.keep_zeros = keep_zeros
        self.num_inherited = 0
        """Weights that were zero when the run began and are kept so."""
        self.threshold: float | None = None
        """The largest magnitude that the last event pruned; None before the first and for other scores."""
        self.kept: dict[str, int] = {}
        """Kept weights of each prunable parameter, over all ranks."""
        self.num_prunable = 0
        self._has_magnitudes = score == "magnitude"
        self._events = frozenset(schedule.events())
        self._density_sum = 0.0
        self._num_steps = 0
        self._parameters: dict[str, Tensor] = {}
        self._shards: list[ParameterShard] = []
        self._layout = RankLayout()
        self._hooks: list[RemovableHandle] = []
        self._is_loaded = False

    @property
    def density(self) -> float:
        """Share of the prunable weights that is kept now."""
        return sum(self.kept.values()) / self.num_prunable if self.num_prunable else 1.0

    @property
    def average_density(self) -> float:
        """Mean density over the steps run so far."""
        return self._density_sum / self._num_steps if self._num_steps else 1.0

    def metrics(self, step: int) -> dict[str, float]:
        """The figures to log while `step` is the last step that ran."""
        figures = {
            "sparsity/density": self.density,
            "sparsity/target_density": self.schedule.density(step),
            "sparsity/average_density": self.average_density,
            "sparsity/nonzero_linear_params": float(sum(self.kept.values())),
        }
        return figures if self.threshold is None else {**figures, "sparsity/threshold": self.threshold}

    def layer_densities(self) -> dict[str, float]:
        """Share kept of each prunable parameter."""
        return {name: self.kept[name] / param.numel() for name, param in self._parameters.items()}

    # --- the Trainer's events ---

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._is_loaded:
            self._is_loaded = False
            return
        assert model is not None
        check_weights_are_in_reach(model, args)
        if self._events and max(self._events) > state.max_steps - 1:
            raise ValueError(
                f"The prune window ends at step {max(self._events)}, outside a run of {state.max_steps} steps: end the "
                "window earlier or train longer."
            )
        self.bind(model)
        if state.global_step > 0:
            self._restore(state.global_step, state.stateful_callbacks.get(STATE_KEY))  # type: ignore[union-attr]
        elif self.keep_zeros:
            self.inherit()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step in self._events and self.schedule.density(state.global_step) < self.density:
            self.prune(self.schedule.density(state.global_step), optimizer)
        self._density_sum += self.density
        self._num_steps += 1

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # AdamW leaves pruned weights at 0 by itself; optimizers that mix weights, like Muon, do not.
        for param, shard in zip(self._parameters.values(), self._shards, strict=True):
            zero_pruned_(param, shard.mask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._leave_state(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave_state(state, control)

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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()

    # --- what the events do; each can be called without a loop ---

    def bind(self, model: nn.Module) -> None:
        """Find the prunable parameters of a prepared model and mask their gradients from now on."""
        self._remove_hooks()
        self.threshold, self._density_sum, self._num_steps = None, 0.0, 0
        self._parameters = prunable_parameters(model, self.include, self.requires_dense)
        self._layout = rank_layout(list(self._parameters.values()))
        self._shards = make_shards(self._parameters)
        self._hooks = mask_gradients(zip(self._parameters.values(), self._shards, strict=True))
        self.num_prunable = sum(param.numel() for param in self._parameters.values())
        self.kept = {name: param.numel() for name, param in self._parameters.items()}

    def inherit(self) -> None:
        """Take the masks over from the model's exact zeros. Collective."""
        masks_from_zeros(self._shards)
        self._count()
        self.num_inherited = self.num_prunable - sum(self.kept.values())

    def prune(self, density: float, optimizer: Any = None) -> None:
        """Prune to `density`: round((1 - density) x N) weights in all. Collective over all ranks."""
        num_pruned = round((1.0 - density) * self.num_prunable)
        self._refresh()
        threshold = prune_smallest_(self._shards, num_pruned, score=self.score, layout=self._layout)
        if threshold is None:
            return
        check_replicas_agree(self._shards, self._layout)
        for param, shard in zip(self._parameters.values(), self._shards, strict=True):
            zero_pruned_(param, shard.mask)
            if optimizer is not None:
                zero_pruned_state_(state_holder(optimizer), param, shard.mask)
        self._count()
        if self._has_magnitudes:
            self.threshold = magnitude_of_key(threshold.key)

    # --- checkpoints that carry masks ---

    @property
    def shards(self) -> list[ParameterShard]:
        """The local shards with their masks, after `bind`."""
        return self._shards

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the masks of `shards`: plain numbers, the same on every rank."""
        return {
            "density_sum": self._density_sum,
            "num_steps": self._num_steps,
            "threshold": self.threshold,
            "num_inherited": self.num_inherited,
            "kept": dict(self.kept),
        }

    def load_state(self, state: dict[str, Any], global_step: int) -> None:
        """Go on at `global_step` from `state`, once `bind` was called and the saved masks were written into `shards`.

        A ValueError says what disagrees: the masks with the saved counts, the weights with the masks, or the number
        pruned with the schedule. The next on_train_begin then leaves everything as it is. Collective.
        """
        self._count()
        for name in dict.fromkeys([*self.kept, *state["kept"]]):
            found, saved = self.kept.get(name), state["kept"].get(name)
            if found != saved:
                raise ValueError(
                    f"The mask of {name} keeps {found} weights where the checkpoint counted {saved}: it lost its masks "
                    "or is of another model; resume from another checkpoint."
                )
        alive = count_nonzero_pruned(self._shards, self._layout)
        if alive:
            raise ValueError(
                f"The checkpoint has {alive:,} weights that its masks prune but that are not 0: it is damaged or was "
                "edited; resume from another checkpoint."
            )
        density = self.schedule.density(global_step - 1) if global_step else 1.0
        scheduled = max(round((1.0 - density) * self.num_prunable), state["num_inherited"])
        pruned = self.num_prunable - sum(self.kept.values())
        if pruned != scheduled:
            raise ValueError(
                f"The checkpoint has {pruned:,} pruned weights where the schedule prunes {scheduled:,} before step "
                f"{global_step}: it is of another schedule; resume from another checkpoint."
            )
        self.num_inherited = state["num_inherited"]
        self.threshold = state["threshold"]
        self._density_sum, self._num_steps = state["density_sum"], state["num_steps"]
        self._is_loaded = True

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

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
        num_pruned = round((1.0 - self.schedule.density(global_step - 1)) * self.num_prunable)
        if num_pruned or self.keep_zeros:
            masks_from_zeros(self._shards)
            self._count()
            found = self.num_prunable - sum(self.kept.values())
            if found != num_pruned and not (self.keep_zeros and found > num_pruned):
                raise ValueError(
                    f"The checkpoint has {found:,} zero weights where {num_pruned:,} are pruned after step "
                    f"{global_step - 1}: it is not of this run, lost its masks, or kept a weight of exactly 0; resume from "
                    "another one."
                )
        self._num_steps = global_step
        self._density_sum = self.schedule.average_density(global_step) * global_step

    def _refresh(self) -> None:
        """FSDP2 may have put the shards into new memory since they were last looked at."""
        for param, shard in zip(self._parameters.values(), self._shards, strict=True):
            shard.values = local_values(param)

    def _count(self) -> None:
        self.kept = dict(zip(self._parameters, count_kept(self._shards, self._layout), strict=True))
