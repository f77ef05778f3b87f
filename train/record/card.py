"""The model card: model/README.md in the hub's format, made only from the run's figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from conf.schema import Config, tokenizer_of
from sparsity.common.files import write_atomically
from sparsity.common.text import count_text, finite_text, half_up, percent_text, power_text
from sparsity.pattern import UNSTRUCTURED, parse_pattern
from sparsity.registry import label_of
from sparsity.scope import SCOPES
from sparsity.score import SCORES
from train.plan.architecture import describe
from train.plan.branch import public_branch_words, read_branch
from train.plan.run import RunPlan
from train.record.directory import RunDirectory
from train.record.siblings import Figures, find_siblings, finite, has_sparse_weights, is_sparse, match_words
from train.record.summary import SHARE_OF_FINAL_STEPS
from train.record.table import markdown
from train.record.terms import (
    BIBTEX,
    PAPER,
    PAPER_URL,
    base_model_terms,
    licence_words,
    public_name,
    source_of,
    tokenizer_terms,
    tokenizer_words,
)


def card_text(config: Config, plan: RunPlan, summary: Figures, siblings: Sequence[Figures] = ()) -> str:
    """Return README.md: its yaml header and its Markdown.

    Figures that are not finite are left out of the header and shown as such in the text.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        summary: The run's figures.
        siblings: Summaries of finished runs of the same series.
    """
    own = {**summary, "run_name": plan.run_dir.name}
    sections = [
        f"# {own['run_name']}\n\n{_opening(config, plan, own)}",
        f"## Model\n\n{_model(config, plan, own)}",
        f"## Figures\n\n{_figures(own)}",
        f"## Training\n\n{_training(config, plan, own, siblings)}",
        f"## Series\n\n{_series(own, siblings)}",
        f"## Usage\n\n{_usage(config, plan)}",
        f"## Limits\n\n{_limits(own)}",
        f"## Licence and terms\n\n{_terms(config)}",
        f"## Citation\n\nThe method is that of [{PAPER}]({PAPER_URL}); please cite it.\n\n```bibtex\n{BIBTEX}\n```",
    ]
    header = card_data(config, plan, own).to_yaml()
    return str(ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"))


def card_data(config: Config, plan: RunPlan, summary: Figures) -> ModelCardData:
    """Return the yaml header, from which the hub reads tags, licence, data and results."""
    source, window = source_of(config.data), summary["perplexity_window"]
    names = {
        "perplexity": f"perplexity per token, disjoint windows of {window} tokens",
        "bits_per_byte": f"bits per byte, disjoint windows of {window} tokens",
    }
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.hub_id or config.data.source,
            dataset_name=f"{source.name} (held-out documents)",
            dataset_config=config.data.subset,
            dataset_args={"heldout_share": config.data.heldout_share},
            metric_type=metric,
            metric_name=name,
            metric_value=summary[metric],
            metric_args={"window": window},
        )
        for metric, name in names.items()
        if math.isfinite(summary[metric])
    ]
    kind = ["sparse"] if has_sparse_weights(summary) else ["dense"]
    if is_sparse(summary):
        kind += ["pruning", f"{config.sparsity.score.replace(':', '-')}-pruning"]
    return ModelCardData(
        language=source.language,
        license=config.card.license,
        license_name=config.card.license_name,
        license_link=config.card.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparsellm", plan.architecture, *kind, "arxiv:2501.12486"],
        datasets=[source.hub_id] if source.hub_id else None,
        metrics=["perplexity"] if results else None,
        model_name=plan.run_dir.name,
        eval_results=results or None,
    )


def _opening(config: Config, plan: RunPlan, own: Figures) -> str:
    zeros = f"{percent_text(own['sparsity'])} of the weights in its linear layers are exactly zero"
    outcome = (
        f"pruned during training: {zeros}"
        if is_sparse(own)
        else f"sparse because it kept the zeros of the model it started from: {zeros}"
        if has_sparse_weights(own)
        else "dense: nothing was pruned"
    )
    start = "pre-trained from scratch"
    if config.init_from is not None:
        start = f"trained further from the weights of `{public_name(config.init_from)}`"
    what = "LLaMA" if plan.model.path is None else f"model of the architecture `{plan.architecture}`"
    return (
        f"A {what} of {count_text(own['total_params'])} parameters, {start} and {outcome}. Trained by sparsellm, an "
        f"implementation of [{PAPER.split(':')[0]}]({PAPER_URL}); it is not one of the checkpoints published with the "
        "paper."
    )


def _model(config: Config, plan: RunPlan, own: Figures) -> str:
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
    return _bullets(lines)


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


def _figures(own: Figures) -> str:
    rows = [
        ("Figure", "Value", "Convention"),
        ("---", "---", "---"),
        (
            "Perplexity",
            finite_text(own["perplexity"], 2),
            "exp of the held-out loss: per token of this model's tokenizer, in disjoint windows of "
            f"{own['perplexity_window']} tokens, each scored without the text before it",
        ),
        (
            "Held-out loss",
            finite_text(own["heldout_loss"], 4),
            "nats per token, the mean over all full windows without the first token of each",
        ),
        (
            "Bits per byte",
            finite_text(own["bits_per_byte"], 4),
            f"all {own['heldout_tokens']:,} tokens in the same windows, over the {own['heldout_bytes']:,} bytes of the "
            "text in UTF-8; compares models with different tokenizers",
        ),
        (
            "Bits per byte, unigram",
            finite_text(own["unigram_bits_per_byte"], 4),
            "the same for a model that guesses tokens by their frequency in the training data",
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"All on documents held out from the training data.\n\n{table}\n\nThe perplexities that the paper's authors "
        "publish for their checkpoints are on WikiText-103, by a convention they do not document: do not compare them "
        "with these."
    )


def _training(config: Config, plan: RunPlan, own: Figures, siblings: Sequence[Figures]) -> str:
    optim, steps, length = config.trainer, own["steps"], plan.sequence_length
    warmup = (
        f"{optim.warmup_steps:g} steps" if optim.warmup_steps >= 1 else f"{100 * optim.warmup_steps:g}% of the steps"
    )
    decay = "".join(f", {key} {value}" for key, value in optim.lr_scheduler_kwargs.items())
    num_final = min(steps, max(2, round(SHARE_OF_FINAL_STEPS * steps)))
    branch = read_branch(plan.run_dir)
    lines = {
        **({"Branch": public_branch_words(branch)} if branch else {}),
        **_parametrisation(config),
        "Training steps": f"{steps:,}",
        "Batch size": f"{own['batch_tokens']:,} tokens ({own['batch_tokens'] // length:,} sequences x {length:,})",
        "Learning rate": f"{power_text(own['learning_rate'])} at its peak, warm-up over {warmup}, then "
        f"`{optim.lr_scheduler_type}`{decay}",
        "Optimizer": f"`{optim.optim}`, betas {optim.adam_beta1:g} and {optim.adam_beta2:g}, eps "
        f"{power_text(optim.adam_epsilon)}, weight decay {optim.weight_decay:g}, gradient norm clipped at "
        f"{optim.max_grad_norm:g}",
        **_by_source(own),
        "Total training tokens": f"{own['total_tokens']:,} ({count_text(own['total_tokens'], 1)}), steps x batch size",
        "Final training loss": f"{finite_text(own['final_train_loss'], 4)} ± {finite_text(own['final_train_loss_std'], 4)} "
        f"nats per token: mean ± population standard deviation of the batch losses of the last {num_final:,} steps, "
        "1% of the run and at least 2",
    }
    if is_sparse(own):
        start, end, every = own["prune_start_step"], own["prune_end_step"], own["prune_every_steps"]
        curve = f", {label_of(plan.schedule)}" if plan.schedule else ""
        lines |= {
            "Pruning start step": f"{start:,}, counted from 0; weights are pruned before the step trains",
            "Pruning end step": f"{end:,}",
            "Pruning interval": f"every {every:,} steps, {(end - start) // every + 1:,} times in all{curve}"
            if end > start
            else "all at once",
        }
    if twin := match_words(config, plan, own, siblings):
        lines["Matching dense model" if has_sparse_weights(own) else "Dense twin of"] = twin
    processes = "1 process" if own["world_size"] == 1 else f"{own['world_size']} processes"
    sharding = "FSDP2" if own["fsdp_version"] == 2 else "no sharding"
    lines["Run"] = f"{processes}, {sharding}, {half_up(own['seconds'] / 3600, 2)} hours, seed {optim.seed}"
    return _bullets(lines)


def _by_source(own: Figures) -> dict[str, str]:
    tokens, epochs = own.get("tokens_by_source"), own.get("epochs_by_source")
    if not tokens or not epochs:
        return {}
    total = sum(tokens.values())
    parts = [
        f"{name} {count_text(count, 1)} ({percent_text(count / total)}"
        # Text that only the run had before it branched has no epochs.
        + (f", {half_up(epochs[name], 2)} epochs)" if name in epochs else ")")
        for name, count in tokens.items()
    ]
    return {"Tokens by source": ", ".join(parts)}


def _parametrisation(config: Config) -> dict[str, str]:
    model, lines = config.model, {}
    if model.init == "authors" and config.init_from is None:
        lines["Initial weights"] = (
            "linear layers from a normal distribution cut off at 2 standard deviations, with variance 1/fan-in; embedding "
            "normal with a standard deviation of 1 (`model.init=authors`)"
        )
    if model.query_scale == "folded":
        lines["Query weights"] = (
            "trained, and pruned, sqrt(head size) times smaller than in these files, with no scale in attention "
            "(`model.query_scale=folded`)"
        )
    if words := [
        *(["begin with bos"] if config.data.bos else []),
        *([] if config.data.eos else ["end without eos"]),
        *([f"are cut at {limit:,} tokens"] if (limit := config.data.max_document_tokens) else []),
        *(["are read without attention to earlier documents"] if config.data.attention == "document" else []),
    ]:
        lines["Documents"] = "; ".join(words)
    return lines


def _series(own: Figures, siblings: Sequence[Figures]) -> str:
    rows = sorted([own, *siblings], key=lambda row: (not has_sparse_weights(row), row["sparsity"], row["run_name"]))
    lines = [finite(row) | ({"run_name": f"**{row['run_name']}**"} if row is own else {}) for row in rows]
    notes = [
        "Batch size and total tokens are in tokens; total tokens = training steps x batch size.",
        "Average linear parameters are the mean over the steps of the weights not yet pruned.",
        "Final training loss is that of the last 1% of the steps, mean ± standard deviation.",
        "Perplexity is per token of held-out documents; it compares runs of the same data, tokenizer and window.",
    ]
    for row in rows:
        if (row["data"], row["perplexity_window"]) != (own["data"], own["perplexity_window"]):
            notes.append(f"`{row['run_name']}`: scored on {row['data']}, windows of {row['perplexity_window']} tokens.")
    return markdown(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _usage(config: Config, plan: RunPlan) -> str:
    """Return example code that works when pasted; if there is no hub_id, it loads the run's folder.

    Only the end of an absolute path is shown, because a card may be published and the rest of the path is private.
    """
    run_dir, start = plan.run_dir, "the folder that training was started in"
    if run_dir.is_absolute():
        run_dir, start = Path(run_dir.name), "the folder that holds the run's own"
    name = config.card.hub_id or (run_dir / "model").as_posix()
    place = (
        "" if config.card.hub_id else f"`name` is this folder's path from {start}; elsewhere, give its path there.\n\n"
    )
    return f"""{place}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(name, ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

prompt = tokenizer({json.dumps(config.prompt, ensure_ascii=False)}, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**prompt, max_new_tokens={min(50, plan.model.max_position_embeddings // 2)}, do_sample=True)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def _limits(own: Figures) -> str:
    words = (
        "A base model for research on scaling: it continues text, was tuned neither to follow instructions nor to be "
        "safe, and repeats what its training data says, mistakes included."
    )
    if has_sparse_weights(own):
        words += (
            " To transformers a zero is a weight like any other: the sparsity saves memory and time only once the "
            "weights are in a sparse format with kernels for it."
        )
    return words


def _terms(config: Config) -> str:
    base = {} if config.init_from is None else {"Model it started from": base_model_terms(config.init_from)}
    return _bullets(
        {
            "Licence of this model": licence_words(config.card),
            **base,
            "Training data": source_of(config.data).terms,
            "Tokenizer": tokenizer_terms(tokenizer_of(config)),
        }
    )


def _bullets(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}:** {text}" for name, text in lines.items())


def _count(count: int) -> str:
    return f"{count:,} ({count_text(count)})"


def write_card(config: Config, plan: RunPlan, directory: RunDirectory, summary: Figures) -> None:
    """Write model/README.md. Only rank 0 calls this, before the summary marks the run as finished."""
    siblings = find_siblings(plan.run_dir, Path(config.runs_dir))
    write_atomically(directory.model / "README.md", card_text(config, plan, summary, siblings))
