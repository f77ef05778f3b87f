"""Counts of the weights in a model's linear layers that are exactly zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsity.prunable import own_linear_weights
from sparsity.shards import local_values, rank_layout


@dataclass(frozen=True)
class ZeroCount:
    """The number of weights, and of zeros among them."""

    num_weights: int
    num_zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros; 0 if there are no weights."""
        return self.num_zeros / self.num_weights if self.num_weights else 0.0


@dataclass(frozen=True)
class ModelZeros(ZeroCount):
    """The zeros of a model and of each layer."""

    layers: dict[str, ZeroCount]


@torch.no_grad()
def count_zeros(model: nn.Module) -> ModelZeros:
    """Count the zeros in each linear layer and in all of them. A weight shared with an embedding is not counted.

    Collective: over the shard group.
    """
    weights = own_linear_weights(model)
    if not weights:
        return ModelZeros(0, 0, {})
    nonzero = torch.stack([torch.count_nonzero(local_values(weight)) for weight in weights.values()])
    counts = rank_layout(list(weights.values())).sum_counts(nonzero).tolist()
    layers = {
        name: ZeroCount(weight.numel(), weight.numel() - count)
        for (name, weight), count in zip(weights.items(), counts, strict=True)
    }
    return ModelZeros(
        sum(layer.num_weights for layer in layers.values()), sum(layer.num_zeros for layer in layers.values()), layers
    )
