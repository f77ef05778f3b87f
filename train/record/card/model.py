"""The card's section about the model: its shape, how it was pruned, its data, its parameters."""

from __future__ import annotations

from collections.abc import Sequence

from conf.schema import Config, tokenizer_of
from sparsity.common.text import count_text, half_up, markdown_list, percent_text
from sparsity.pattern import UNSTRUCTURED, parse_pattern
from sparsity.registry import label_of
from sparsity.scope import SCOPES
from sparsity.score import SCORES
from train.plan.architecture import describe
from train.plan.run import RunPlan
from train.record.siblings import Figures, has_sparse_weights, is_sparse
from train.record.terms import source_of, tokenizer_words


def model_section(config: Config, plan: RunPlan, own: Figures) -> str:
    """Return a list of the model's properties, from its type to its average size over training."""
    model = plan.model
    width = model.hidden_size if model.path is None else describe(model).attention_width
    architecture = "LLaMA" if model.path is None else plan.architecture
    shape = [
        f"`{model.name}`: {model.num_hidden_layers} layers",
        f"hidden size {model.hidden_size}",
        f"{model.num_attention_heads} heads of {width // model.num_attention_heads}",
        f"{model.num_key_value_heads} key-value heads",
        f"MLP {model.intermediate_size}",
        f"context {model.max_position_embeddings}",
        f"vocabulary {model.vocab_size}",
        f"{'shared' if model.tie_word_embeddings else 'separate'} input and output embeddings",
    ]
    head = "including lm_head, without the embedding"
    if model.tie_word_embeddings:
        head = "lm_head is tied to the embedding and not counted"
    lines = {
        "Model type": f"{'sparse' if has_sparse_weights(own) else 'dense'} causal language model, {architecture} architecture",
        "Shape": ", ".join(shape),
        "Sparsity configuration": _sparsity(config, own),
        "Training data": _data(config),
        "Tokenizer": tokenizer_words(tokenizer_of(config)),
        "Weights": f"safetensors, {config.export.dtype}"
        + ("; pruned weights are stored as zeros" * has_sparse_weights(own)),
        "Total parameters": _count(own["total_params"]),
        "Linear parameters": f"{_count(own['linear_params'])}: the weights of the linear layers, {head}",
        "Non-zero linear parameters": _count(own["nonzero_linear_params"]),
        "Sparsity of the linear layers": f"{percent_text(own['sparsity'])}, counted in the finished weights",
        "Average linear parameters over training": f"{_count(round(own['avg_linear_params']))}, average density "
        f"{half_up(own['average_density'], 4)}: the share not yet pruned, averaged over all {own['steps']:,} steps",
    }
    return markdown_list(lines)


def _sparsity(config: Config, own: Figures) -> str:
    if not is_sparse(own):
        return "the zeros it started with, kept" if has_sparse_weights(own) else "none, dense throughout"
    sparsity = config.sparsity
    pruned = "the weights of all linear layers"
    if sparsity.include is not None:
        pruned = f"the weights {_patterns(sparsity.include)}"
    if sparsity.requires_dense:
        pruned += f" but {_patterns(sparsity.requires_dense)}"
    targets = [f"{100 * group.target:g}% of {_patterns(group.include)}" for group in sparsity.groups]
    rest = "the rest of " if targets else ""
    amounts = ", ".join([*targets, f"{100 * sparsity.target:g}% of {rest}{pruned}"])
    pattern, score, scope = parse_pattern(sparsity.pattern), SCORES.find(sparsity.score), SCOPES.find(sparsity.scope)
    where = UNSTRUCTURED if pattern is None else label_of(pattern)
    ranking = label_of(score)
    if sparsity.normalize != "none":
        ranking += f", divided by the {sparsity.normalize} norm of its parameter"
    ranking += "".join(f", that of `{pattern}` times {factor:g}" for pattern, factor in sparsity.factors.items())
    if score.has_values or not scope.compares_parameters:
        ranking += ", " + label_of(scope) + (" of a group" if targets and scope.compares_parameters else "")
    return f"{amounts}, {where}, {ranking}; {label_of(sparsity.make_update())}"


def _patterns(patterns: Sequence[str]) -> str:
    return " ".join(f"`{pattern}`" for pattern in patterns)


def _data(config: Config) -> str:
    data = config.data
    details = [
        f", subset `{data.subset}`" if data.subset else "",
        f", the first {data.max_documents:,} documents" if data.max_documents else "",
        f"; {100 * data.heldout_share:g}% of the documents, chosen by a hash of their text, are held out",
    ]
    return source_of(data).name + "".join(details)


def _count(count: int) -> str:
    return f"{count:,} ({count_text(count)})"
