"""How many weights of a model's linear layers are exactly zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsity.prunable import own_linear_weights


@dataclass(frozen=True)
class ZeroCount:
    num_weights: int
    num_zeros: int

    @property
    def sparsity(self) -> float:
        return self.num_zeros / self.num_weights


@dataclass(frozen=True)
class ModelZeros(ZeroCount):
    layers: dict[str, ZeroCount]


def count_zeros(model: nn.Module) -> ModelZeros:
    """Zeros of each linear layer's weight, and of all of them; a weight shared with an embedding counts as that."""
    layers = {
        name: ZeroCount(weight.numel(), weight.numel() - int(torch.count_nonzero(weight)))
        for name, weight in own_linear_weights(model).items()
    }
    return ModelZeros(
        sum(layer.num_weights for layer in layers.values()), sum(layer.num_zeros for layer in layers.values()), layers
    )
