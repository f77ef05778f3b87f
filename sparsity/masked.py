"""The prunable parameters of a model with their masks: what is pruned is counted, written as 0 and kept at 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from sparsity.mask import (
    check_replicas_agree,
    count_kept,
    leaves_zeros,
    make_shards,
    state_holder,
    states_of,
    zero_all_pruned_,
    zero_pruned_,
)
from sparsity.prunable import plain_name
from sparsity.shards import ParameterShard, RankLayout, local_values, rank_layout


class MaskedParameters:
    """Parameters whose pruned weights, with their gradients and optimizer states, are exactly 0.

    The masks say which weights are pruned. Whoever changes them calls `masks_changed`.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        """The prunable parameters by name."""
        self.shards: list[ParameterShard] = []
        """The local shard of each parameter, with its mask."""
        self.layout = RankLayout()
        """The ranks over which the parameters are sharded."""
        self.kept: dict[str, int] = {}
        """Number of kept weights of each prunable parameter, over all ranks."""
        self.num_prunable = 0
        self.on_gradient: Callable[[ParameterShard, Tensor], bool] | None = None
        """Called with each gradient before it is masked; returns whether to mask it."""
        self._hooks: list[RemovableHandle] = []
        self._updates_leave_zeros = False
        """True if the optimizer keeps zeros at 0, and its states were zeroed under the current masks."""

    @property
    def density(self) -> float:
        """The share of the prunable weights that is kept now."""
        return sum(self.kept.values()) / self.num_prunable if self.num_prunable else 1.0

    def layer_densities(self) -> dict[str, float]:
        """Return the kept share of each prunable parameter."""
        return {name: self.kept[name] / param.numel() for name, param in self.parameters.items()}

    # --- the parameters ---

    def attach(self, parameters: dict[str, Tensor]) -> None:
        """Give `parameters` masks that keep everything, and mask their gradients from now on."""
        self.unbind()
        self.parameters = parameters
        self.layout = rank_layout(list(parameters.values()))
        self.shards = make_shards(parameters)
        self.kept = self._all_kept()
        self.num_prunable = sum(self.kept.values())
        self._updates_leave_zeros = False
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._mask_gradient, shard))
            for param, shard in zip(parameters.values(), self.shards, strict=True)
        ]

    def unbind(self) -> None:
        """Stop masking gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _all_kept(self) -> dict[str, int]:
        return {name: param.numel() for name, param in self.parameters.items()}

    def _mask_gradient(self, shard: ParameterShard, param: Tensor) -> None:
        """Set pruned gradients to exactly 0, NaN included, as soon as they are accumulated and before any clipping.

        Under FSDP2 this is the gradient of the local shard, already summed over the ranks.
        """
        if param.grad is not None and (self.on_gradient is None or self.on_gradient(shard, param.grad)):
            zero_pruned_(param.grad, shard.mask)

    def refresh(self) -> None:
        """Take new views of the shards, because FSDP2 may have moved them in memory."""
        for param, shard in zip(self.parameters.values(), self.shards, strict=True):
            shard.values = local_values(param)

    def follow(self, model: nn.Module) -> None:
        """Switch to the parameters that `model` holds now, in case other tensors replaced them under the same names.

        Raises:
            ValueError: A pruned parameter is missing or has another shape.
        """
        if any(isinstance(param, DTensor) for param in self.parameters.values()):
            return  # FSDP2 itself puts other tensors there between a forward pass and the next resharding.
        self.parameters.update(same_parameters(model, self.parameters))

    # --- the zeros ---

    def zero_pruned(self, optimizer: Any = None) -> None:
        """Write 0 into every pruned weight, and into its states if `optimizer` is given."""
        holder = None if optimizer is None else state_holder(optimizer)
        zero_all_pruned_(
            (shard.mask, [param, *(states_of(holder, param) if holder is not None else ())])
            for param, shard in zip(self.parameters.values(), self.shards, strict=True)
        )
        if holder is not None:
            self._updates_leave_zeros = leaves_zeros(holder)

    def after_update(self, optimizer: Any = None) -> None:
        """Zero the pruned weights after an update of `optimizer`, unless the update itself keeps them at 0.

        `sparsity.mask.leaves_zeros` recognizes such optimizers. For these, weights and states are zeroed once after each
        change of masks, because reading all masks and weights takes time at every step.
        """
        if optimizer is None or not self._updates_leave_zeros:
            self.zero_pruned(optimizer)

    def restore_all(self) -> None:
        """Unmask every weight; each keeps its current value, normally 0 for a pruned one."""
        for shard in self.shards:
            shard.mask.fill_(True)
        self.kept = self._all_kept()

    # --- the counts ---

    def masks_changed(self, optimizer: Any = None) -> None:
        """Zero the pruned weights and count the kept ones after masks were changed.

        Collective: over all ranks.
        """
        check_replicas_agree(self.shards, self.layout)
        counted = self._start_count()
        # Zero the weights before the host waits for the counts, so that the device is busy meanwhile.
        self.zero_pruned(optimizer)
        self._end_count(counted)

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


def same_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that `model` holds under the names of `parameters`.

    Raises:
        ValueError: A parameter is missing or has another shape.
    """
    now = {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
    for name, param in parameters.items():
        found = now.get(name)
        if found is None or found.shape != param.shape:
            raise ValueError(
                f"{name} is no longer in the model with shape {list(param.shape)}: it was replaced during training, "
                "so it cannot be kept sparse; replace it after training, or name it in requires_dense."
            )
    return {name: now[name] for name in parameters}
