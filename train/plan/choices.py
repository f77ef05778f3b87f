"""A run's settings that change its results but appear in no figure, in words; those with default values are left out."""

from __future__ import annotations

from conf.schema import Config
from sparsity.registry import label_of


def choice_words(config: Config, *, prunes: bool) -> list[str]:
    """Return one phrase for each choice of model, text and sparsity that is not the default.

    Args:
        config: The run's configuration.
        prunes: Whether the run has prune events; if it has none, factors have no effect.
    """
    model, data, words = config.model, config.data, []
    if model.init == "authors" and config.init_from is None:
        words.append("weights drawn by fan-in (model.init=authors)")
    if model.query_scale == "folded":
        words.append("attention's scale folded into the query weights (model.query_scale=folded)")
    if data.bos:
        words.append("documents begin with bos (data.bos=true)")
    if not data.eos:
        words.append("documents end without eos (data.eos=false)")
    if data.max_document_tokens is not None:
        words.append(f"documents cut at {data.max_document_tokens:,} tokens (data.max_document_tokens)")
    if data.attention == "document":
        words.append("no attention across documents (data.attention=document)")
    if not prunes:
        return words
    sparsity = config.sparsity
    words += [f"scores of {pattern} times {factor:g}" for pattern, factor in sparsity.factors.items()]
    if sparsity.normalize != "none":
        words.append(f"each parameter's scores divided by their {sparsity.normalize} norm")
    if sparsity.update != "shrink":
        words.append(label_of(sparsity.make_update()))
    return words
