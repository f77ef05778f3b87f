"""Checks that a user's choices fit the layers of a model; they read shapes and classes, never weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn

from sparsity.pattern import Blocks, Pattern
from sparsity.prunable import check_inputs_are_last, check_pattern, plain_name
from sparsity.registry import name_of
from sparsity.scope import Scope
from sparsity.score import Score
from sparsity.shards import RankLayout


def check_layers(
    model: nn.Module, parameters: Mapping[str, Tensor], pattern: Pattern | None, scope: Scope, score: Score
) -> None:
    """Raise a ValueError if a pattern, scope or score does not fit the layers of the parameters."""
    if pattern is not None:
        check_pattern(model, parameters, pattern)
    if scope.is_by_row:
        check_inputs_are_last(model, parameters, f"scope={name_of(scope)} compares", "take scope=uniform")
    if "activations" in score.needs:
        check_inputs(model, parameters, name_of(score))


def check_inputs(model: nn.Module, parameters: Mapping[str, Tensor], score: str) -> None:
    """Raise a ValueError if a parameter is not the weight of an nn.Linear, whose inputs can be seen."""
    linear = linear_layers(model)
    for name in parameters:
        if name not in linear:
            raise ValueError(
                f"score={score} needs the inputs of each layer, and {name} is not the weight of an nn.Linear, which shows "
                "them: name it in requires_dense, or take score=magnitude."
            )


def check_shards(parameters: Mapping[str, Tensor], pattern: Pattern | None, layout: RankLayout) -> None:
    """Raise a ValueError if blocks of the pattern would be on two ranks."""
    if isinstance(pattern, Blocks) and layout.shard_group is not None:
        num_ranks = dist.get_world_size(layout.shard_group)
        for name, param in parameters.items():
            pattern.check_shards(name, param.shape, num_ranks)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by the names of their weights."""
    return {
        plain_name(f"{path}.weight" if path else "weight"): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
