"""The card's section about training: recipe, tokens, loss, prune window, and the matching run."""

from __future__ import annotations

from collections.abc import Sequence

from conf.schema import Config
from sparsity.common.text import count_text, finite_text, half_up, markdown_list, percent_text, power_text
from sparsity.registry import label_of
from train.plan.branch import public_branch_words, read_branch
from train.plan.run import RunPlan
from train.record.siblings import Figures, has_sparse_weights, is_sparse, match_words
from train.record.summary import SHARE_OF_FINAL_STEPS


def training_section(config: Config, plan: RunPlan, own: Figures, siblings: Sequence[Figures]) -> str:
    """Return a list of the run's settings and outcome; `siblings` are searched for the matching dense or sparse run."""
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
    return markdown_list(lines)


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
