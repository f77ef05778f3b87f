"""The pruner: a model's masks, and the events that change them; usable with or without a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.arguments import check_names
from sparsity.choices import Choices
from sparsity.event import prune_pool_
from sparsity.event.activations import Calibration, input_norms
from sparsity.event.blocks import keep_whole_blocks_
from sparsity.event.collapse import all_zero_names, refuse_all_zero
from sparsity.event.needs import event_score
from sparsity.event.pool import check_blocks
from sparsity.factors import check_factor_names
from sparsity.layers import check_layers, check_shards
from sparsity.mask import masks_from_zeros
from sparsity.masked import MaskedParameters
from sparsity.notices import collapse_notice, frozen_notice, left_out_notice, warn_on_rank_0
from sparsity.pattern import Blocks
from sparsity.prunable import left_out, own_linear_weights, prunable_parameters
from sparsity.schedule import Ramp, Schedule
from sparsity.scope import Pool, make_pools, seen_together
from sparsity.score import Score, magnitude_of_key
from sparsity.shards import ParameterShard, rank_layout


class Pruner(MaskedParameters):
    """The masks on a model's prunable parameters, and the methods that change them.

    Args:
        schedule: The share of weights to keep at each step, see `sparsity.schedule`.
        choices: The other arguments of `sparsity.choices.Choices`.

    Raises:
        ValueError: Some choices cannot be combined; the message names them.
    """

    def __init__(self, schedule: Schedule, **choices: Any) -> None:
        super().__init__()
        check_names(choices, [name for name, one in Choices.__dataclass_fields__.items() if one.init])
        self.choices = Choices(schedule, **choices)
        self.schedule = schedule
        self.events = self.choices.events
        self.inherited: dict[str, int] = {}
        """Number of weights of each prunable parameter that were zero when the run began and stay zero."""
        self.threshold: float | None = None
        """The largest score that the last event pruned, multiplied by its parameter's factor if it has one. None before
        the first event, and for scores whose keys are not numbers."""
        self.overall = schedule
        """The schedule of all prunable weights together; it differs from `schedule` if groups have their own targets."""
        self.pools: list[Pool] = []
        """The sets of weights that compete with each other; set by `bind`."""
        self.input_norms: dict[str, Tensor] = {}
        """The norm of each input of each parameter's layer; set by `calibrate`."""
        self._has_frozen = False

    @property
    def num_inherited(self) -> int:
        """The number of weights that were zero when the run began and stay zero."""
        return sum(self.inherited.values())

    def target_density(self, step: int) -> float:
        """Return the share that the schedule keeps while `step` runs, or less if more zeros were inherited."""
        inherited = self.num_inherited / self.num_prunable if self.num_prunable else 0.0
        return min(self.overall.density(step), 1.0 - inherited)

    # --- the model ---

    def bind(self, model: nn.Module) -> None:
        """Find the prunable parameters of a prepared model and mask their gradients from now on.

        Raises:
            ValueError: Nothing is prunable, or a choice does not fit the layers or their shards.
        """
        self.unbind()
        self.threshold, self.inherited, self.input_norms = None, {}, {}
        choices = self.choices
        parameters = prunable_parameters(model, choices.include, choices.requires_dense)
        check_layers(model, parameters, choices.pattern, choices.scope, choices.score)
        check_factor_names(parameters, choices.factors)
        linear = own_linear_weights(model)
        self._has_frozen = any(not weight.requires_grad for weight in linear.values())
        say_what_is_pruned(model, parameters, linear, choices)
        self.pools = make_pools(
            {name: tuple(param.shape) for name, param in parameters.items()}, choices.scope, choices.groups
        )
        if isinstance(self.schedule, Ramp):
            self.overall = seen_together(self.schedule, self.pools)
        check_shards(parameters, choices.pattern, rank_layout(list(parameters.values())))
        self.attach(parameters)

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

    def check_blocks(self) -> None:
        """Raise a ValueError if blocks of the pattern have lost more weights than it allows.

        Collective: over the shard group.
        """
        check_blocks(self.shards, self.choices.pattern, self.layout)

    def check_adapters(self) -> None:
        """Raise a ValueError if a model with frozen weights, such as LoRA, trains a parameter that is still all zeros.

        An adapter's second matrix starts at 0 and stays far smaller than its first one. Magnitude pruning would therefore
        remove it first, even after some steps.

        Collective: over the shard group.
        """
        removes = not self.events or any(self.scheduled(max(self.events)))
        if self._has_frozen and self.choices.score.is_zero_first and removes:
            refuse_all_zero(all_zero_names(self.shards, self.layout), "when training begins beside frozen weights")

    # --- pools ---

    def scheduled(self, step: int) -> list[int]:
        """Return how many weights of each pool are pruned while `step` runs; step -1 is before the run."""
        return self._whole(self.choices.scope.counts(self.pools, self.schedule, step))

    def _whole(self, counts: list[int]) -> list[int]:
        """Return counts of pruned weights as the pattern can have them."""
        pattern = self.choices.pattern
        return counts if pattern is None else [pattern.whole(count) for count in counts]

    def num_pruned(self, pool: Pool) -> int:
        """Return how many weights of a pool are pruned now."""
        return pool.numel - sum(self.kept[name] for name in pool.names)

    def shards_of(self, pool: Pool) -> list[ParameterShard]:
        """Return the local shards of a pool."""
        members = set(pool.names)
        return [shard for shard in self.shards if shard.name in members]

    # --- events ---

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
        with self.event_score(optimizer) as score:
            keys = [
                self._prune_pool(pool, count, score)
                for pool, count in zip(self.pools, counts, strict=True)
                if count > self.num_pruned(pool)
            ]
        if not keys:
            return
        if before_zeroing is not None:
            before_zeroing()
        self.masks_changed(optimizer)
        for name in (name for name, kept in self.kept.items() if before[name] and not kept):
            warn_on_rank_0(collapse_notice(name, self.choices.scope))
        if self.choices.score.has_values:
            self.threshold = magnitude_of_key(max(keys))

    def _prune_pool(self, pool: Pool, count: int, score: Score) -> int:
        """Choose the masks of a pool and return the largest key pruned. Collective: over the shard group."""
        shards = self.shards_of(pool)
        if score.is_zero_first:
            whole = [shard for shard in shards if self.kept[shard.name] == shard.full_numel]
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
        return key

    def event_score(self, optimizer: Any) -> AbstractContextManager[Score]:
        """Return a context in which the event's score can rank the shards' weights, see `sparsity.event.needs`.

        Collective: over the shard group.
        """
        return event_score(
            self.choices,
            self.parameters,
            self.shards,
            self.layout,
            optimizer=optimizer,
            input_norms=self.input_norms,
        )

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


def say_what_is_pruned(
    model: nn.Module, parameters: Mapping[str, Tensor], linear: Mapping[str, Tensor], choices: Choices
) -> None:
    """Warn on rank 0 of frozen weights among the linear ones, and of matrices that no rule prunes."""
    rest = [] if choices.include is not None else left_out(model, parameters, choices.requires_dense)
    for notice in (frozen_notice(parameters, linear), left_out_notice(rest)):
        if notice is not None:
            warn_on_rank_0(notice)
