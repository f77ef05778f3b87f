"""SparsityCallback: *when* weights are pruned, inside any `transformers.Trainer`: one process, DDP, FSDP2 or HSDP."""

from __future__ import annotations

import sys
import warnings
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
from sparsity.pattern import UNSTRUCTURED, parse_pattern
from sparsity.prunable import check_pattern, prunable_parameters
from sparsity.prune import count_overfull_blocks, prune_pool_
from sparsity.resume import STATE_KEY, masks_from_weights, surviving_zeros
from sparsity.schedule import Ramp, Schedule
from sparsity.scope import Group, Pool, ScopeName, make_pools, num_pruned, seen_together
from sparsity.score import ScoreName, magnitude_of_key, score_named
from sparsity.shards import ParameterShard, RankLayout, local_values, rank_layout
from sparsity.wrappers import check_weights_are_in_reach


class SparsityCallback(TrainerCallback):
    """Prunes the smallest weights before the steps that the schedule names, and keeps them at exactly 0.

    `scope` and `groups` say which weights compete (`sparsity.scope`), `pattern` where they may go (`sparsity.pattern`),
    `score` what ranks them. `include` and `requires_dense` are name patterns, see `prunable_parameters`. With
    `keep_zeros` a run that starts from a sparse model keeps its zeros, and events prune only beyond them; with
    `Fixed()` as schedule that is all. Figures go into the Trainer's log history and, with `report` and a running wandb
    run, to wandb. Draws from no global random generator and leaves survivors untouched: with a sparsity of 0 a run
    equals one without the callback to the last bit.

    Every rank runs it alike; an event's collectives sum counts over the shard group and compare a hash over replicas.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        score: ScoreName = "magnitude",
        scope: ScopeName = "global",
        groups: Sequence[Group] = (),
        pattern: str = UNSTRUCTURED,
        include: Sequence[str] | None = None,
        requires_dense: Sequence[str] = (),
        seed: int = 0,
        report: bool = True,
        keep_zeros: bool = False,
    ) -> None:
        self.schedule = schedule
        self.score = score_named(score, seed)
        self.scope = scope
        self.groups = groups
        self.pattern = parse_pattern(pattern)
        self.include = include
        self.requires_dense = requires_dense
        self.report = report
        self._events = frozenset(schedule.events())
        self.keep_zeros = keep_zeros or not self._events
        self.inherited: dict[str, int] = {}
        """Weights of each prunable parameter that were zero when the run began and are kept so."""
        self.threshold: float | None = None
        """The largest magnitude that the last event pruned; None before the first and for other scores."""
        self.kept: dict[str, int] = {}
        """Kept weights of each prunable parameter, over all ranks."""
        self.num_prunable = 0
        self._has_magnitudes = score == "magnitude"
        self._density_sum = 0.0
        self._num_steps = 0
        self._parameters: dict[str, Tensor] = {}
        self._shards: list[ParameterShard] = []
        self._pools: list[Pool] = []
        self._overall = schedule
        self._layout = RankLayout()
        self._hooks: list[RemovableHandle] = []
        self._is_loaded = False
        self._check_options(score)

    def _check_options(self, score: str) -> None:
        make_pools({}, self.scope)
        if self.groups and not isinstance(self.schedule, Ramp):
            raise ValueError(
                f"groups need a schedule that can end at their own targets, not {type(self.schedule).__name__}: choose one "
                "of sparsity.schedule, such as Geometric."
            )
        chosen = {
            "scope": self.scope if self.scope != "global" else None,
            "pattern": self.pattern,
            "score": score if score != "magnitude" else None,
        }
        if not self._events and (idle := next((f"{key}={value}" for key, value in chosen.items() if value), None)):
            raise ValueError(
                f"{idle} has no effect with {type(self.schedule).__name__}(), which keeps the zeros there are and prunes "
                "nothing: leave it out, or choose a schedule with events."
            )
        if self.pattern is not None:
            for sparsity in (1 - self.schedule.density(max(self._events)), *(group.sparsity for group in self.groups)):
                self.pattern.check_sparsity(sparsity)

    @property
    def density(self) -> float:
        """Share of the prunable weights that is kept now."""
        return sum(self.kept.values()) / self.num_prunable if self.num_prunable else 1.0

    @property
    def average_density(self) -> float:
        """Mean density over the steps run so far."""
        return self._density_sum / self._num_steps if self._num_steps else 1.0

    @property
    def num_inherited(self) -> int:
        """Weights that were zero when the run began and are kept so."""
        return sum(self.inherited.values())

    def metrics(self, step: int) -> dict[str, float]:
        """The figures to log while `step` is the last step that ran."""
        figures = {
            "sparsity/density": self.density,
            "sparsity/target_density": self._overall.density(step),
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
        if state.global_step in self._events:
            self.prune_at(state.global_step, optimizer)
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
        self.threshold, self._density_sum, self._num_steps, self.inherited = None, 0.0, 0, {}
        self._parameters = prunable_parameters(model, self.include, self.requires_dense)
        if self.pattern is not None:
            check_pattern(model, self._parameters, self.pattern)
        self.kept = {name: param.numel() for name, param in self._parameters.items()}
        self.num_prunable = sum(self.kept.values())
        self._pools = make_pools(self.kept, self.scope, self.groups)
        if isinstance(self.schedule, Ramp):
            self._overall = seen_together(self.schedule, self._pools)
        self._layout = rank_layout(list(self._parameters.values()))
        self._shards = make_shards(self._parameters)
        self._hooks = mask_gradients(zip(self._parameters.values(), self._shards, strict=True))

    def inherit(self) -> None:
        """Take the masks over from the model's exact zeros. Collective."""
        self._masks_from_zeros()
        self.inherited = {name: self._parameters[name].numel() - kept for name, kept in self.kept.items()}
        for name in (name for name, kept in self.kept.items() if not kept):
            warnings.warn(
                f"{name} is all zeros and stays so; name it in requires_dense if it is new and to be trained.",
                stacklevel=2,
            )

    def prune_at(self, step: int, optimizer: Any = None) -> None:
        """The event before `step`: prune each pool to its density there. Collective over all ranks."""
        self._prune([pool.num_pruned(self.schedule, step) for pool in self._pools], optimizer)

    def prune(self, density: float, optimizer: Any = None) -> None:
        """Prune each pool to `density`: round((1 - density) x N) of its N weights. Collective over all ranks."""
        self._prune([num_pruned(pool.numel, density) for pool in self._pools], optimizer)

    def _prune(self, counts: Sequence[int], optimizer: Any) -> None:
        """Prune the pools to as many weights as `counts` says, those that have lost as many already left as they are."""
        self._refresh()
        keys = []
        for pool, count in zip(self._pools, counts, strict=True):
            if count > self._num_pruned(pool):
                shards = [shard for shard in self._shards if shard.name in pool.names]
                threshold = prune_pool_(shards, count, pattern=self.pattern, score=self.score, layout=self._layout)
                assert threshold is not None
                keys.append(threshold.key)
        if not keys:
            return
        check_replicas_agree(self._shards, self._layout)
        for param, shard in zip(self._parameters.values(), self._shards, strict=True):
            zero_pruned_(param, shard.mask)
            if optimizer is not None:
                zero_pruned_state_(state_holder(optimizer), param, shard.mask)
        self._count()
        if self._has_magnitudes:
            self.threshold = magnitude_of_key(max(keys))

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
            "inherited": dict(self.inherited),
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
        self.inherited = dict(state["inherited"])
        for pool in self._pools:
            inherited = sum(self.inherited.get(name, 0) for name in pool.names)
            scheduled = max(pool.num_pruned(self.schedule, global_step - 1), inherited)
            if self._num_pruned(pool) != scheduled:
                raise ValueError(
                    f"The checkpoint has {self._num_pruned(pool):,} pruned weights{self._of(pool)} where the schedule prunes "
                    f"{scheduled:,} before step {global_step}: it is of another schedule; resume from another checkpoint."
                )
        self._check_blocks()
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
        counts = [pool.num_pruned(self.schedule, global_step - 1) for pool in self._pools]
        if sum(counts) or self.keep_zeros:
            self._masks_from_zeros()
        for pool, count in zip(self._pools, counts, strict=True):
            found = self._num_pruned(pool)
            if found != count and not (self.keep_zeros and found > count):
                raise ValueError(
                    f"The checkpoint has {found:,} zero weights{self._of(pool)} where {count:,} are pruned after step "
                    f"{global_step - 1}: it is not of this run, lost its masks, or kept a weight of exactly 0; resume from "
                    "another one."
                )
        self._num_steps = global_step
        average = self._overall.average_density(global_step) if self._events else self.density
        self._density_sum = average * global_step

    def _masks_from_zeros(self) -> None:
        masks_from_zeros(self._shards)
        self._count()
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.pattern is not None and (overfull := count_overfull_blocks(self._shards, self.pattern, self._layout)):
            raise ValueError(
                f"{overfull:,} blocks of {self.pattern.block} weights have more than "
                f"{self.pattern.block - self.pattern.kept} zeros, so pattern={self.pattern} cannot end at its sparsity: "
                "start from a dense model or one of this pattern, or take pattern=unstructured."
            )

    def _of(self, pool: Pool) -> str:
        """Which weights, in the words of an error."""
        if len(self._pools) == 1:
            return ""
        return f" in {pool.names[0]}" + (f" and {len(pool.names) - 1} others" if len(pool.names) > 1 else "")

    def _num_pruned(self, pool: Pool) -> int:
        return pool.numel - sum(self.kept[name] for name in pool.names)

    def _refresh(self) -> None:
        """FSDP2 may have put the shards into new memory since they were last looked at."""
        for param, shard in zip(self._parameters.values(), self._shards, strict=True):
            shard.values = local_values(param)

    def _count(self) -> None:
        self.kept = dict(zip(self._parameters, count_kept(self._shards, self._layout), strict=True))
