"""A run's choices that move its results and that no figure shows, in words: empty for the usual ones."""

from __future__ import annotations

from conf.schema import Config


def choice_words(config: Config, *, prunes: bool) -> list[str]:
    """Return one phrase for each choice of model and sparsity that is not the default.

    Args:
        config: The run's configuration.
        prunes: Whether the run has prune events; factors mean nothing without them.
    """
    model, words = config.model, []
    if model.init == "authors" and config.init_from is None:
        words.append("weights drawn by fan-in (model.init=authors)")
    if model.query_scale == "folded":
        words.append("attention's scale folded into the query weights (model.query_scale=folded)")
    factors = config.sparsity.factors.items() if prunes else ()
    return words + [f"scores of {pattern} times {factor:g}" for pattern, factor in factors]
