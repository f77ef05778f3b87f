"""The score of one event, with the data that it reads besides the weights: gradients, optimizer states, activation norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sparsity.choices import Choices
from sparsity.event.gradients import STATE as GRADIENT_STATE
from sparsity.event.norms import inverse_norms
from sparsity.factors import factor_of, scaled
from sparsity.mask import flat_states_of, state_holder
from sparsity.registry import name_of
from sparsity.score import Score
from sparsity.shards import ParameterShard, RankLayout


@contextmanager
def event_score(
    choices: Choices,
    parameters: Mapping[str, Tensor],
    shards: Sequence[ParameterShard],
    layout: RankLayout,
    *,
    optimizer: Any = None,
    input_norms: Mapping[str, Tensor] | None = None,
) -> Iterator[Score]:
    """Yield the score of one event with its factors; the shards hold what it needs until the end.

    Collective: over the shard group.

    Args:
        choices: The score, with the factors and the norm of each parameter's scores.
        parameters: The prunable parameters by name.
        shards: This rank's shard of each of them, in the same order.
        layout: The ranks that hold the other shards.
        optimizer: The optimizer, for scores that read its states or a gradient.
        input_norms: The norms of each parameter's inputs, for scores that read activations.

    Raises:
        ValueError: The score needs data that is missing.
    """
    score, factors = choices.score, choices.factors
    lend_activations(score, shards, input_norms or {})
    lend_states(score, parameters, shards, optimizer)
    if choices.normalize != "none":
        norms = inverse_norms(shards, score, choices.normalize, layout)
        factors = {name: factor_of(name, factors) * norm for name, norm in norms.items()}
    try:
        yield scaled(score, factors)
    finally:
        for shard in shards:
            shard.state, shard.gradient, shard.input_norms = {}, None, None


def lend_activations(score: Score, shards: Sequence[ParameterShard], input_norms: Mapping[str, Tensor]) -> None:
    """Put the activation norms into the shards if the score reads them; raise a ValueError if there are none."""
    if "activations" not in score.needs:
        return
    if not input_norms:
        raise ValueError(f"score={name_of(score)} needs activation norms: call the pruner's calibrate() before.")
    for shard in shards:
        shard.input_norms = input_norms[shard.name].to(shard.values.device)


def lend_states(
    score: Score, parameters: Mapping[str, Tensor], shards: Sequence[ParameterShard], optimizer: Any
) -> None:
    """Put the optimizer's states into the shards if the score reads them, and the gradient, which leaves the optimizer.

    Raises:
        ValueError: There is no optimizer, or it holds no gradient although the score reads one.
    """
    if not {*score.needs} - {"activations"}:
        return
    if optimizer is None:
        raise ValueError(f"score={name_of(score)} needs the optimizer: pass it when pruning.")
    holder = state_holder(optimizer)
    for param, shard in zip(parameters.values(), shards, strict=True):
        shard.state = flat_states_of(holder, param)
        shard.gradient = shard.state.pop(GRADIENT_STATE, None)
        holder.state.get(param, {}).pop(GRADIENT_STATE, None)
        if "gradient" in score.needs and shard.gradient is None:
            raise ValueError(
                f"score={name_of(score)} needs the gradient of the step before the event, but {shard.name} has none: "
                "the first event must be after step 0, and a Trainer that resumes at an event under FSDP2 must be "
                "started with `python -m launch`."
            )
