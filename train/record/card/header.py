"""The card's yaml header, from which the hub reads tags, licence, data and results."""

from __future__ import annotations

import math

from huggingface_hub import EvalResult, ModelCardData

from conf.schema import Config
from train.plan.run import RunPlan
from train.record.siblings import Figures, has_sparse_weights, is_sparse
from train.record.terms import source_of


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
