"""Which weights of a model are pruned: masks, counts and checks, to be called with or without a training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from sparsity.collapse import all_zero_names, refuse_all_zero
from sparsity.event import count_overfull_blocks, prune_pool_
from sparsity.factors import check_factor_names, check_factors
from sparsity.mask import (
    check_replicas_agree,
    count_kept,
    leaves_zeros,
    make_shards,
    mask_gradients,
    masks_from_zeros,
    state_holder,
    states_of,
    zero_all_pruned_,
)
from sparsity.notices import frozen_notice, left_out_notice, warn_on_rank_0
from sparsity.pattern import UNSTRUCTURED, parse_pattern
from sparsity.prunable import check_pattern, left_out, own_linear_weights, plain_name, prunable_parameters
from sparsity.schedule import Ramp, Schedule
from sparsity.scope import Group, Pool, ScopeName, make_pools, num_pruned, seen_together
from sparsity.score import ScoreName, magnitude_of_key, scaled, score_named
from sparsity.shards import ParameterShard, RankLayout, local_values, rank_layout


class Pruner:
    """Masks on a model's prunable parameters, and how they come about.

    How many weights go follows from `schedule`; which compete, from `scope` and `groups` (`sparsity.scope`); where they
    may go, from `pattern` (`sparsity.pattern`); what ranks them, from `score` (`sparsity.score`), multiplied by `factors`,
    {name pattern: factor} (`sparsity.factors`). `include` and `requires_dense` are name patterns, see
    `prunable_parameters`. A ValueError says which choices do not go together.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        score: ScoreName = "magnitude",
        factors: Mapping[str, float] | None = None,
        scope: ScopeName = "global",
        groups: Sequence[Group] = (),
        pattern: str = UNSTRUCTURED,
        include: Sequence[str] | None = None,
        requires_dense: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.schedule = schedule
        self.factors = dict(factors or {})
        self.score = scaled(score_named(score, seed), self.factors)
        self.scope = scope
        self.groups = groups
        self.pattern = parse_pattern(pattern)
        self.include = include
        self.requires_dense = requires_dense
        self.inherited: dict[str, int] = {}
        """Weights of each prunable parameter that were zero when the run began and are kept so."""
        self.threshold: float | None = None
        """The largest magnitude that the last event pruned, times the factor of its parameter if it has one; None before the
        first event and for other scores."""
        self.kept: dict[str, int] = {}
        """Kept weights of each prunable parameter, over all ranks."""
        self.num_prunable = 0
        self.overall = schedule
        """The schedule of all prunable weights together, where groups have targets of their own."""
        self._has_magnitudes = score == "magnitude"
        self.events = frozenset(schedule.events())
        self.shards: list[ParameterShard] = []
        """The local shards with their masks, after `bind`."""
        self.pools: list[Pool] = []
        """The weights that compete, after `bind`."""
        self.layout = RankLayout()
        """Which ranks share out the parameters, after `bind`."""
        self.parameters: dict[str, Tensor] = {}
        """The prunable parameters by name, after `bind`."""
        self._has_frozen = False
        self._hooks: list[RemovableHandle] = []
        self._updates_leave_zeros = False
        """Known of the optimizer, and of its states under these masks."""
        self._check_choices(score)

    def _check_choices(self, score: str) -> None:
        make_pools({}, self.scope)
        check_factors(self.factors, score, self.scope)
        if self.groups and not isinstance(self.schedule, Ramp):
            raise ValueError(
                f"groups need a schedule that can end at their own targets, not {type(self.schedule).__name__}: choose one "
                "of sparsity.schedule, such as Geometric."
            )
        if not self.events:
            chosen = {
                "scope": self.scope,
                "pattern": str(self.pattern or UNSTRUCTURED),
                "score": score,
                "factors": str(self.factors),
            }
            usual = ("global", UNSTRUCTURED, "magnitude", "{}")
            for (key, value), default in zip(chosen.items(), usual, strict=True):
                if value != default:
                    raise ValueError(
                        f"{key}={value} has no effect with {type(self.schedule).__name__}(), which keeps the zeros there are "
                        "and prunes nothing: leave it out, or choose a schedule with events."
                    )
        if self.pattern is not None:
            for sparsity in (1 - self.schedule.density(max(self.events)), *(group.sparsity for group in self.groups)):
                self.pattern.check_sparsity(sparsity)

    @property
    def density(self) -> float:
        """Share of the prunable weights that is kept now."""
        return sum(self.kept.values()) / self.num_prunable if self.num_prunable else 1.0

    @property
    def num_inherited(self) -> int:
        """Weights that were zero when the run began and are kept so."""
        return sum(self.inherited.values())

    def target_density(self, step: int) -> float:
        """The share that the schedule keeps while `step` trains, less where more was inherited."""
        inherited = self.num_inherited / self.num_prunable if self.num_prunable else 0.0
        return min(self.overall.density(step), 1.0 - inherited)

    def layer_densities(self) -> dict[str, float]:
        """Share kept of each prunable parameter."""
        return {name: self.kept[name] / param.numel() for name, param in self.parameters.items()}

    def bind(self, model: nn.Module) -> None:
        """Find the prunable parameters of a prepared model and mask their gradients from now on."""
        self.unbind()
        self.threshold, self.inherited = None, {}
        self.parameters = prunable_parameters(model, self.include, self.requires_dense)
        if self.pattern is not None:
            check_pattern(model, self.parameters, self.pattern)
        check_factor_names(self.parameters, self.factors)
        self._say_what_is_pruned(model)
        self.kept = {name: param.numel() for name, param in self.parameters.items()}
        self.num_prunable = sum(self.kept.values())
        self.pools = make_pools(self.kept, self.scope, self.groups)
        if isinstance(self.schedule, Ramp):
            self.overall = seen_together(self.schedule, self.pools)
        self.layout = rank_layout(list(self.parameters.values()))
        self.shards = make_shards(self.parameters)
        self._updates_leave_zeros = False
        self._hooks = mask_gradients(zip(self.parameters.values(), self.shards, strict=True))

    def _say_what_is_pruned(self, model: nn.Module) -> None:
        linear = own_linear_weights(model)
        self._has_frozen = any(not weight.requires_grad for weight in linear.values())
        rest = [] if self.include is not None else left_out(model, self.parameters, self.requires_dense)
        for notice in (frozen_notice(self.parameters, linear), left_out_notice(rest)):
            if notice is not None:
                warn_on_rank_0(notice)

    def unbind(self) -> None:
        """Stop masking gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def inherit(self) -> None:
        """Take the model's exact zeros as masks, and keep them whatever the schedule says. Collective."""
        self.take_masks_from_zeros()
        self.note_inherited()
        for name in (name for name, kept in self.kept.items() if not kept):
            warn_on_rank_0(
                f"{name} is all zeros and stays so; name it in requires_dense if it is new and to be trained."
            )

    def check_adapters(self) -> None:
        """Raise a ValueError if a model with frozen weights, as LoRA's, trains a parameter that is all zeros so far.

        An adapter's second matrix begins at 0 and stays far smaller than the first, so magnitude prunes it first even
        after some steps. Collective: over the shard group.
        """
        removes = not self.events or any(pool.num_pruned(self.schedule, max(self.events)) for pool in self.pools)
        if self._has_frozen and self._has_magnitudes and removes:
            refuse_all_zero(all_zero_names(self.shards, self.layout), "when training begins beside frozen weights")

    def note_inherited(self) -> None:
        """Keep the current zeros whatever the schedule says."""
        self.inherited = {name: self.parameters[name].numel() - kept for name, kept in self.kept.items()}

    def take_masks_from_zeros(self) -> None:
        """Take every exact 0 as pruned; raise a ValueError if the pattern has no room for it. Collective."""
        masks_from_zeros(self.shards)
        self.recount()
        self.check_blocks()

    def prune_at(self, step: int, optimizer: Any = None) -> None:
        """Run the event before `step`: prune each pool to its density there. Collective over all ranks."""
        self._prune([pool.num_pruned(self.schedule, step) for pool in self.pools], optimizer)

    def prune(self, density: float, optimizer: Any = None) -> None:
        """Prune each pool to `density`: round((1 - density) x N) of its N weights. Collective over all ranks."""
        self._prune([num_pruned(pool.numel, density) for pool in self.pools], optimizer)

    def _prune(self, counts: Sequence[int], optimizer: Any) -> None:
        """Prune the pools to as many weights as `counts` says; one that has already lost as many stays as it is."""
        self.refresh()
        before = dict(self.kept)
        keys = []
        for pool, count in zip(self.pools, counts, strict=True):
            if count > self.num_pruned(pool):
                members = set(pool.names)
                shards = [shard for shard in self.shards if shard.name in members]
                if self._has_magnitudes:
                    whole = [shard for shard in shards if before[shard.name] == shard.full_numel]
                    refuse_all_zero(all_zero_names(whole, self.layout), "at its first prune event")
                threshold = prune_pool_(shards, count, pattern=self.pattern, score=self.score, layout=self.layout)
                assert threshold is not None
                keys.append(threshold.key)
        if not keys:
            return
        check_replicas_agree(self.shards, self.layout)
        counted = self._start_count()
        # Before the host waits for the counts, so that the device has work meanwhile.
        self.zero_pruned(optimizer)
        self._end_count(counted)
        for name in (name for name, kept in self.kept.items() if before[name] and not kept):
            warn_on_rank_0(f"{name} has lost its last weight; name it in requires_dense, or take scope=uniform.")
        if self._has_magnitudes:
            self.threshold = magnitude_of_key(max(keys))

    def zero_pruned(self, optimizer: Any = None) -> None:
        """Write 0 into every pruned weight, and into its states in `optimizer`."""
        holder = None if optimizer is None else state_holder(optimizer)
        zero_all_pruned_(
            (shard.mask, [param, *(states_of(holder, param) if holder is not None else ())])
            for param, shard in zip(self.parameters.values(), self.shards, strict=True)
        )
        if holder is not None:
            self._updates_leave_zeros = leaves_zeros(holder)

    def follow(self, model: nn.Module) -> None:
        """Take the parameters that `model` holds now, if others were put in their place under the same names.

        Raises:
            ValueError: A pruned parameter is gone or has another shape.
        """
        if any(isinstance(param, DTensor) for param in self.parameters.values()):
            return  # FSDP2 itself shows other tensors between a forward and the next resharding.
        now = {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
        for name, param in self.parameters.items():
            found = now.get(name)
            if found is None or found.shape != param.shape:
                raise ValueError(
                    f"{name} is not in the model any more with the shape {list(param.shape)}: it was replaced during training, "
                    "so it cannot be kept sparse; replace it after training, or name it in requires_dense."
                )
            self.parameters[name] = found

    def after_update(self, optimizer: Any = None) -> None:
        """Zero the pruned weights after an update of `optimizer`, unless the update leaves them at 0 by itself.

        `sparsity.mask.leaves_zeros` knows such optimizers. For them weights and states are zeroed once under the same
        masks: reading masks and weights at every step is not free.
        """
        if optimizer is None or not self._updates_leave_zeros:
            self.zero_pruned(optimizer)

    def check_blocks(self) -> None:
        """Raise a ValueError if blocks of the pattern have lost more weights than it lets go. Collective."""
        if self.pattern is not None and (overfull := count_overfull_blocks(self.shards, self.pattern, self.layout)):
            raise ValueError(
                f"{overfull:,} blocks of {self.pattern.block} weights have more than "
                f"{self.pattern.block - self.pattern.kept} zeros, so pattern={self.pattern} cannot end at its sparsity: "
                "start from a dense model or one of this pattern, or take pattern=unstructured."
            )

    def num_pruned(self, pool: Pool) -> int:
        """Return how many weights of a pool are pruned now."""
        return pool.numel - sum(self.kept[name] for name in pool.names)

    def refresh(self) -> None:
        """Look the shards up anew: FSDP2 may have put them into other memory."""
        for param, shard in zip(self.parameters.values(), self.shards, strict=True):
            shard.values = local_values(param)

    def recount(self) -> None:
        """Count the kept weights after masks were changed from outside. Collective."""
        self._end_count(self._start_count())

    def _start_count(self) -> Tensor:
        """Kept weights of each parameter, not waited for. Collective."""
        self._updates_leave_zeros = False
        return count_kept(self.shards, self.layout)

    def _end_count(self, counts: Tensor) -> None:
        self.kept = dict(zip(self.parameters, counts.tolist(), strict=True))
