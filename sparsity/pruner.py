"""The masks on a model's weights, with their counts and checks; usable with or without a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from sparsity.activations import Calibration, check_inputs, input_norms
from sparsity.arguments import check_names
from sparsity.blocks import count_mixed_blocks, keep_whole_blocks_
from sparsity.choices import Choices
from sparsity.collapse import all_zero_names, refuse_all_zero
from sparsity.event import count_overfull_blocks, prune_pool_
from sparsity.factors import check_factor_names, factor_of
from sparsity.gradients import STATE as GRADIENT_STATE
from sparsity.mask import (
    check_replicas_agree,
    count_kept,
    flat_states_of,
    leaves_zeros,
    make_shards,
    masks_from_zeros,
    state_holder,
    states_of,
    zero_all_pruned_,
    zero_pruned_,
)
from sparsity.norms import inverse_norms
from sparsity.notices import collapse_notice, frozen_notice, left_out_notice, warn_on_rank_0
from sparsity.pattern import Blocks, Pattern
from sparsity.prunable import (
    check_inputs_are_last,
    check_pattern,
    left_out,
    own_linear_weights,
    plain_name,
    prunable_parameters,
)
from sparsity.registry import name_of
from sparsity.schedule import Ramp, Schedule
from sparsity.scope import Pool, Scope, make_pools, seen_together
from sparsity.score import Score, magnitude_of_key, scaled
from sparsity.shards import ParameterShard, RankLayout, local_values, rank_layout


class Pruner:
    """The masks on a model's prunable parameters, and the methods that change them.

    Args:
        schedule: The share of weights to keep at each step, see `sparsity.schedule`.
        choices: The other arguments of `sparsity.choices.Choices`.

    Raises:
        ValueError: Some choices cannot be combined; the message names them.
    """

    def __init__(self, schedule: Schedule, **choices: Any) -> None:
        check_names(choices, [name for name, one in Choices.__dataclass_fields__.items() if one.init])
        self.choices = Choices(schedule, **choices)
        self.schedule = schedule
        self.events = self.choices.events
        self.inherited: dict[str, int] = {}
        """Number of weights of each prunable parameter that were zero when the run began and stay zero."""
        self.threshold: float | None = None
        """The largest score that the last event pruned, multiplied by its parameter's factor if it has one. None before
        the first event, and for scores whose keys are not numbers."""
        self.kept: dict[str, int] = {}
        """Number of kept weights of each prunable parameter, over all ranks."""
        self.num_prunable = 0
        self.overall = schedule
        """The schedule of all prunable weights together; it differs from `schedule` if groups have their own targets."""
        self.shards: list[ParameterShard] = []
        """The local shards with their masks; set by `bind`."""
        self.pools: list[Pool] = []
        """The sets of weights that compete with each other; set by `bind`."""
        self.layout = RankLayout()
        """The ranks over which the parameters are sharded; set by `bind`."""
        self.parameters: dict[str, Tensor] = {}
        """The prunable parameters by name; set by `bind`."""
        self.input_norms: dict[str, Tensor] = {}
        """The norm of each input of each parameter's layer; set by `calibrate`."""
        self.on_gradient: Callable[[ParameterShard, Tensor], bool] | None = None
        """Called with each gradient before it is masked; returns whether to mask it."""
        self._has_frozen = False
        self._hooks: list[RemovableHandle] = []
        self._updates_leave_zeros = False
        """Whether the optimizer keeps zeros at 0, and its states were zeroed under the current masks."""

    @property
    def density(self) -> float:
        """The share of the prunable weights that is kept now."""
        return sum(self.kept.values()) / self.num_prunable if self.num_prunable else 1.0

    @property
    def num_inherited(self) -> int:
        """The number of weights that were zero when the run began and stay zero."""
        return sum(self.inherited.values())

    def target_density(self, step: int) -> float:
        """Return the share that the schedule keeps while `step` runs, or less if more zeros were inherited."""
        inherited = self.num_inherited / self.num_prunable if self.num_prunable else 0.0
        return min(self.overall.density(step), 1.0 - inherited)

    def layer_densities(self) -> dict[str, float]:
        """Return the kept share of each prunable parameter."""
        return {name: self.kept[name] / param.numel() for name, param in self.parameters.items()}

    def bind(self, model: nn.Module) -> None:
        """Find the prunable parameters of a prepared model and mask their gradients from now on."""
        self.unbind()
        self.threshold, self.inherited, self.input_norms = None, {}, {}
        self.parameters = prunable_parameters(model, self.choices.include, self.choices.requires_dense)
        check_layers(model, self.parameters, self.choices.pattern, self.choices.scope, self.choices.score)
        check_factor_names(self.parameters, self.choices.factors)
        self._say_what_is_pruned(model)
        self.kept = {name: param.numel() for name, param in self.parameters.items()}
        self.num_prunable = sum(self.kept.values())
        shapes = {name: tuple(param.shape) for name, param in self.parameters.items()}
        self.pools = make_pools(shapes, self.choices.scope, self.choices.groups)
        if isinstance(self.schedule, Ramp):
            self.overall = seen_together(self.schedule, self.pools)
        self.layout = rank_layout(list(self.parameters.values()))
        self._check_shards()
        self.shards = make_shards(self.parameters)
        self._updates_leave_zeros = False
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._mask_gradient, shard))
            for param, shard in zip(self.parameters.values(), self.shards, strict=True)
        ]

    def _check_shards(self) -> None:
        """Raise a ValueError if blocks of the pattern would be on two ranks."""
        if isinstance(self.choices.pattern, Blocks) and self.layout.shard_group is not None:
            num_ranks = dist.get_world_size(self.layout.shard_group)
            for name, param in self.parameters.items():
                self.choices.pattern.check_shards(name, param.shape, num_ranks)

    def _mask_gradient(self, shard: ParameterShard, param: Tensor) -> None:
        """Set pruned gradients to exactly 0, NaN included, as soon as they are accumulated and before any clipping.

        Under FSDP2 this is the gradient of the local shard, already summed over the ranks.
        """
        if param.grad is not None and (self.on_gradient is None or self.on_gradient(shard, param.grad)):
            zero_pruned_(param.grad, shard.mask)

    def _say_what_is_pruned(self, model: nn.Module) -> None:
        linear = own_linear_weights(model)
        self._has_frozen = any(not weight.requires_grad for weight in linear.values())
        choices = self.choices
        rest = [] if choices.include is not None else left_out(model, self.parameters, choices.requires_dense)
        for notice in (frozen_notice(self.parameters, linear), left_out_notice(rest)):
            if notice is not None:
                warn_on_rank_0(notice)

    def unbind(self) -> None:
        """Stop masking gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def inherit(self) -> None:
        """Make every exact 0 of the model a pruned weight that stays pruned whatever the schedule says.

        Collective: over the shard group.
        """
        self.take_masks_from_zeros()
        self.note_inherited()
        for name in (name for name, kept in self.kept.items() if not kept):
            warn_on_rank_0(
                f"{name} is all zeros and stays zero; name it in requires_dense if it is new and should be trained."
            )

    def check_adapters(self) -> None:
        """Raise a ValueError if a model with frozen weights, such as LoRA, trains a parameter that is still all zeros.

        An adapter's second matrix starts at 0 and stays far smaller than its first one. Magnitude pruning would therefore
        remove it first, even after some steps.

        Collective: over the shard group.
        """
        removes = not self.events or any(self.scheduled(max(self.events)))
        if self._has_frozen and self.choices.score.is_zero_first and removes:
            refuse_all_zero(all_zero_names(self.shards, self.layout), "when training begins beside frozen weights")

    def note_inherited(self) -> None:
        """Keep the current zeros whatever the schedule says."""
        self.inherited = {name: self.parameters[name].numel() - kept for name, kept in self.kept.items()}

    def take_masks_from_zeros(self) -> None:
        """Mark every exact 0 as pruned; raise a ValueError if a block has more zeros than the pattern allows.

        Collective: over the shard group.
        """
        masks_from_zeros(self.shards)
        if isinstance(self.choices.pattern, Blocks):
            keep_whole_blocks_(self.shards, self.choices.pattern)
        self.recount()
        self.check_blocks()

    def scheduled(self, step: int) -> list[int]:
        """Return how many weights of each pool are pruned while `step` runs; step -1 is before the run."""
        return self._whole(self.choices.scope.counts(self.pools, self.schedule, step))

    def _whole(self, counts: list[int]) -> list[int]:
        """Return counts of pruned weights as the pattern can have them."""
        pattern = self.choices.pattern
        return counts if pattern is None else [pattern.whole(count) for count in counts]

    def prune_at(self, step: int, optimizer: Any = None) -> None:
        """Run the event before `step`: prune each pool to its scheduled density.

        Collective: over all ranks.
        """
        self.prune_to(self.scheduled(step), optimizer)

    def prune(self, density: float, optimizer: Any = None) -> None:
        """Prune each pool to `density`: round((1 - density) x N) of its N weights.

        Collective: over all ranks.
        """
        before = [self.num_pruned(pool) for pool in self.pools]
        counts = self.choices.scope.allocate(self.pools, [density] * len(self.pools), before)
        self.prune_to(self._whole(counts), optimizer)

    def calibrate(self, model: nn.Module, calibration: Calibration, device: torch.device | None = None) -> None:
        """Collect the activation norms that the score needs, for all events until the next call.

        Collective: over all ranks.

        Args:
            model: The prepared model.
            calibration: The text.
            device: Where the model computes; None: where its weights are.
        """
        device = device or self.shards[0].values.device
        self.input_norms = input_norms(model, self.parameters, calibration, device)

    def prune_to(
        self, counts: Sequence[int], optimizer: Any = None, before_zeroing: Callable[[], None] | None = None
    ) -> None:
        """Prune each pool until `counts` of its weights are pruned; leave pools that have lost that many already.

        Collective: over all ranks.

        Args:
            counts: The number of pruned weights of each pool afterwards.
            optimizer: The optimizer whose states of pruned weights are zeroed too.
            before_zeroing: Called after the masks are chosen and before weights are zeroed.
        """
        self.refresh()
        before = dict(self.kept)
        keys = []
        with self.event_score(optimizer) as score:
            for pool, count in zip(self.pools, counts, strict=True):
                if count > self.num_pruned(pool):
                    shards = self.shards_of(pool)
                    if score.is_zero_first:
                        whole = [shard for shard in shards if before[shard.name] == shard.full_numel]
                        refuse_all_zero(all_zero_names(whole, self.layout), "at its first prune event")
                    key = prune_pool_(
                        shards,
                        count,
                        pattern=self.choices.pattern,
                        by_row=self.choices.scope.is_by_row,
                        score=score,
                        layout=self.layout,
                    )
                    assert key is not None
                    keys.append(key)
        if not keys:
            return
        if before_zeroing is not None:
            before_zeroing()
        self.masks_changed(optimizer)
        for name in (name for name, kept in self.kept.items() if before[name] and not kept):
            warn_on_rank_0(collapse_notice(name, self.choices.scope))
        if self.choices.score.has_values:
            self.threshold = magnitude_of_key(max(keys))

    def masks_changed(self, optimizer: Any = None) -> None:
        """Zero the pruned weights and count the kept ones after masks were changed.

        Collective: over all ranks.
        """
        check_replicas_agree(self.shards, self.layout)
        counted = self._start_count()
        # Zero the weights before the host waits for the counts, so that the device is busy meanwhile.
        self.zero_pruned(optimizer)
        self._end_count(counted)

    def restore_all(self) -> None:
        """Unmask every weight; each keeps its current value, normally 0 for a pruned one."""
        for shard in self.shards:
            shard.mask.fill_(True)
        self.kept = {name: param.numel() for name, param in self.parameters.items()}

    def shards_of(self, pool: Pool) -> list[ParameterShard]:
        """Return the local shards of a pool."""
        members = set(pool.names)
        return [shard for shard in self.shards if shard.name in members]

    @contextmanager
    def event_score(self, optimizer: Any) -> Iterator[Score]:
        """Yield the score of one event with its factors; the shards hold what it needs until the end.

        Collective: over the shard group.
        """
        choices = self.choices
        if choices.score.needs:
            self._lend(choices.score, optimizer)
        factors = choices.factors
        if choices.normalize != "none":
            norms = inverse_norms(self.shards, choices.score, choices.normalize, self.layout)
            factors = {name: factor_of(name, factors) * norm for name, norm in norms.items()}
        try:
            yield scaled(choices.score, factors)
        finally:
            for shard in self.shards:
                shard.state, shard.gradient, shard.input_norms = {}, None, None

    def _lend(self, score: Score, optimizer: Any) -> None:
        """Put the gradients, optimizer states and activation norms that a score needs into the shards."""
        if "activations" in score.needs:
            if not self.input_norms:
                raise ValueError(
                    f"score={name_of(score)} needs activation norms: call the pruner's calibrate() before."
                )
            for shard in self.shards:
                shard.input_norms = self.input_norms[shard.name].to(shard.values.device)
        if not {*score.needs} - {"activations"}:
            return
        if optimizer is None:
            raise ValueError(f"score={name_of(score)} needs the optimizer: pass it when pruning.")
        for param, shard in zip(self.parameters.values(), self.shards, strict=True):
            shard.state = flat_states_of(state_holder(optimizer), param)
            shard.gradient = shard.state.pop(GRADIENT_STATE, None)
            state_holder(optimizer).state.get(param, {}).pop(GRADIENT_STATE, None)
            if "gradient" in score.needs and shard.gradient is None:
                raise ValueError(
                    f"score={name_of(score)} needs the gradient of the step before the event, but {shard.name} has none: "
                    "the first event must be after step 0, and a Trainer that resumes at an event under FSDP2 must be "
                    "started with `python -m launch`."
                )

    def zero_pruned(self, optimizer: Any = None) -> None:
        """Write 0 into every pruned weight, and into its states if `optimizer` is given."""
        holder = None if optimizer is None else state_holder(optimizer)
        zero_all_pruned_(
            (shard.mask, [param, *(states_of(holder, param) if holder is not None else ())])
            for param, shard in zip(self.parameters.values(), self.shards, strict=True)
        )
        if holder is not None:
            self._updates_leave_zeros = leaves_zeros(holder)

    def follow(self, model: nn.Module) -> None:
        """Switch to the parameters that `model` holds now, in case other tensors replaced them under the same names.

        Raises:
            ValueError: A pruned parameter is missing or has another shape.
        """
        if any(isinstance(param, DTensor) for param in self.parameters.values()):
            return  # FSDP2 itself puts other tensors there between a forward pass and the next resharding.
        now = {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
        for name, param in self.parameters.items():
            found = now.get(name)
            if found is None or found.shape != param.shape:
                raise ValueError(
                    f"{name} is no longer in the model with shape {list(param.shape)}: it was replaced during training, "
                    "so it cannot be kept sparse; replace it after training, or name it in requires_dense."
                )
            self.parameters[name] = found

    def after_update(self, optimizer: Any = None) -> None:
        """Zero the pruned weights after an update of `optimizer`, unless the update itself keeps them at 0.

        `sparsity.mask.leaves_zeros` recognizes such optimizers. For these, weights and states are zeroed once after each
        change of masks, because reading all masks and weights takes time at every step.
        """
        if optimizer is None or not self._updates_leave_zeros:
            self.zero_pruned(optimizer)

    def check_blocks(self) -> None:
        """Raise a ValueError if blocks of the pattern have lost more weights than it allows.

        Collective: over the shard group.
        """
        pattern = self.choices.pattern
        if isinstance(pattern, Blocks):
            if mixed := count_mixed_blocks(self.shards, pattern, self.layout):
                raise ValueError(
                    f"{mixed:,} blocks of {pattern} have both kept and pruned weights: start from a dense model or one of this "
                    "pattern, or take pattern=unstructured."
                )
        elif pattern is not None and (overfull := count_overfull_blocks(self.shards, pattern, self.layout)):
            raise ValueError(
                f"{overfull:,} blocks of {pattern.block} weights have more than {pattern.block - pattern.kept} zeros, so "
                f"pattern={pattern} cannot end at its sparsity: start from a dense model or one of this pattern, or use "
                "pattern=unstructured."
            )

    def num_pruned(self, pool: Pool) -> int:
        """Return how many weights of a pool are pruned now."""
        return pool.numel - sum(self.kept[name] for name in pool.names)

    def refresh(self) -> None:
        """Take new views of the shards, because FSDP2 may have moved them in memory."""
        for param, shard in zip(self.parameters.values(), self.shards, strict=True):
            shard.values = local_values(param)

    def recount(self) -> None:
        """Count the kept weights after masks were changed from outside.

        Collective: over the shard group.
        """
        self._end_count(self._start_count())

    def _start_count(self) -> Tensor:
        """Start counting the kept weights of each parameter, without waiting for the device. Collective: shard group."""
        self._updates_leave_zeros = False
        return count_kept(self.shards, self.layout)

    def _end_count(self, counts: Tensor) -> None:
        self.kept = dict(zip(self.parameters, counts.tolist(), strict=True))


def check_layers(
    model: nn.Module, parameters: Mapping[str, Tensor], pattern: Pattern | None, scope: Scope, score: Score
) -> None:
    """Raise a ValueError if a pattern, scope or score does not fit the layers of the parameters; weights are not read."""
    if pattern is not None:
        check_pattern(model, parameters, pattern)
    if scope.is_by_row:
        check_inputs_are_last(model, parameters, f"scope={name_of(scope)} compares", "take scope=uniform")
    if "activations" in score.needs:
        check_inputs(model, parameters, name_of(score))
