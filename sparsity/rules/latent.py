"""Weights that are trained while they are masked: the straight-through estimator under any wrapper.

Between updates the model holds masked weights, so forward, evaluation, checkpoints and export see exact zeros. The values
of the masked weights are kept here and put back only for the optimizer's update. They are a state of the optimizer, so they
are saved and restored with it, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsity.mask import state_holder, zero_pruned_
from sparsity.shards import ParameterShard, local_values

STATE = "latent"
"""The key in the optimizer's state of a parameter."""


class LatentWeights:
    """The values of each parameter's masked weights; 0 for kept weights."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    @torch.no_grad()
    def put_back(self, parameters: Mapping[str, Tensor], shards: list[ParameterShard], optimizer: Any) -> None:
        """Write the values of masked weights back, so that all weights are as the last update left them."""
        for (name, param), shard in zip(parameters.items(), shards, strict=True):
            latent = local_values(self._of(name, param, optimizer))
            local_values(param).copy_(torch.where(shard.mask, local_values(param), latent))

    @torch.no_grad()
    def take(self, parameters: Mapping[str, Tensor], shards: list[ParameterShard], optimizer: Any) -> None:
        """Store the values of masked weights here and write 0 into the weights."""
        for (name, param), shard in zip(parameters.items(), shards, strict=True):
            latent = local_values(self._of(name, param, optimizer))
            latent.copy_(local_values(param)).masked_fill_(shard.mask, 0)
            zero_pruned_(param, shard.mask)

    def check_restored(self, parameters: Mapping[str, Tensor], optimizer: Any) -> None:
        """Raise a ValueError if the state of a resumed optimizer lacks these values."""
        holder = state_holder(optimizer)
        for name, param in parameters.items():
            state = holder.state.get(param, {})
            if state and STATE not in state:
                raise ValueError(
                    f"The checkpoint has no values of the masked weights of {name}, which update=ste trains: the Trainer saves "
                    "them in one process and under DDP, but not under FSDP2; resume there with `python -m launch`."
                )

    def _of(self, name: str, param: Tensor, optimizer: Any) -> Tensor:
        """Return a parameter's values; keep them in the optimizer's state once it has one."""
        state = state_holder(optimizer).state.get(param, {}) if optimizer is not None else {}
        if STATE in state:
            found: Tensor = state[STATE]
            self._values[name] = found
        elif name not in self._values:
            self._values[name] = torch.zeros_like(param.detach())
        # Leave an empty state empty, because an optimizer creates its states only for parameters that have none.
        if state and STATE not in state:
            state[STATE] = self._values[name]
        return self._values[name]
