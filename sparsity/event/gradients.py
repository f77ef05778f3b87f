"""The dense gradient of one step, which includes pruned weights, collected before gradients are masked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparsity.shards import ParameterShard, local_values

STATE = "dense_gradient"
"""The key in a parameter's optimizer state that holds the gradient from the step before an event until the event."""


class DenseGradients:
    """Gradients of all weights, summed over the micro-batches of one step: float32 [local numel] for each parameter.

    `are_masked` says whether gradients of pruned weights are set to 0 after each micro-batch.
    """

    def __init__(self, are_masked: bool = True) -> None:
        self._sums: dict[str, Tensor] = {}
        self._are_masked = are_masked

    @torch.no_grad()
    def add(self, shard: ParameterShard, gradient: Tensor) -> None:
        """Add a gradient after a backward pass and before it is masked."""
        found, before = local_values(gradient).float(), self._sums.get(shard.name)
        # Kept weights accumulate in the gradient itself; pruned ones were set to 0 after the previous micro-batch.
        if before is None or not self._are_masked:
            self._sums[shard.name] = found.clone()
        else:
            self._sums[shard.name] = torch.where(shard.mask, found, before + found)

    def of(self, shard: ParameterShard, param: Tensor) -> Tensor:
        """Return the gradient of a shard, the same on all replicas; zeros if the step gave it no gradient.

        FSDP2 has already summed gradients when they are collected; DDP has not, so they are summed here.

        Collective: over all ranks under DDP.
        """
        found = self._sums.get(shard.name)
        found = torch.zeros_like(shard.values, dtype=torch.float32) if found is None else found
        if not isinstance(param, DTensor) and dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
        return found
