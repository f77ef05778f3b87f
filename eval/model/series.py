"""Comparison of a published sparsellm-1b checkpoint with its model card and with our plan of the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from conf.compose import composed
from conf.schema import EvalConfig
from sparsity.common.text import half_up, markdown_table, percent_text
from train.plan import hub

OWNER = "tjingrant"
CARD_PERPLEXITY = {
    "sparsellm-1b-20p": 19.58,
    "sparsellm-1b-40p": 19.93,
    "sparsellm-1b-60p": 20.80,
    "sparsellm-1b-80p": 25.77,
    "sparsellm-1b-20p-small-dense": 19.49,
    "sparsellm-1b-40p-small-dense": 21.40,
    "sparsellm-1b-60p-small-dense": 22.58,
    "sparsellm-1b-80p-small-dense": 24.57,
}
"""The perplexities on WikiText-103 in the model cards, which do not name the convention."""
PERPLEXITIES = ("word_perplexity", "token_perplexity", "token_perplexity_stride512")


def hub_name(series: str) -> str:
    return f"{OWNER}/{series}"


def with_series_defaults(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `python -m eval`; `series=NAME` adds the model's hub name and WikiText unless they are given."""
    keys = dict(argument.partition("=")[::2] for argument in arguments)
    added = []
    if series := keys.get("series"):
        if "model" not in keys and "folder" not in keys:
            added.append(f"model={hub_name(series)}")
        if "data" not in keys:
            added.append("data=wikitext")
    return [*added, *arguments]


def check_published(config: EvalConfig) -> None:
    """Fetch the checkpoint if it is not a local folder.

    Raises:
        ValueError: The hub does not answer and its cache holds no such checkpoint, or the folder is not a model's.
    """
    from eval.model.load import model_folder

    try:
        model_folder(config.folder)
    except ValueError:
        if config.series is None or config.folder != hub_name(config.series) or hub.is_reachable():
            raise
        raise ValueError(
            f"series={config.series} cannot be fetched because the hub does not answer: run this command on a machine with "
            f"a network, or run there `hf download {config.folder} --local-dir {config.series}`, copy that folder here and "
            f"add model={config.series}."
        ) from None


def planned_zeros(series: str) -> tuple[int, int]:
    """Return the numbers of zeros and of linear weights at the end of our plan of experiment=SERIES."""
    from train.plan.run import plan_run

    # hydra.main has composed the command's own config and does not allow a second one at the same time.
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        plan = plan_run(composed("train", [f"experiment={series}"]), 1)
    finally:
        GlobalHydra.instance().hydra = outer
    return plan.num_pruned, plan.counts.linear


def zeros_by_kind(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the number of layers, weights and zeros, and the share of zeros, of each kind of linear layer, such as q_proj."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, zeros in figures["layer_zeros"].items():
        kind = kinds.setdefault(name.split(".")[-2], {"layers": 0, "weights": 0, "zeros": 0})
        kind["layers"] += 1
        kind["weights"] += figures["layer_weights"][name]
        kind["zeros"] += zeros
    return {name: {**kind, "share": kind["zeros"] / kind["weights"]} for name, kind in kinds.items()}


def compare_with_card(series: str, figures: dict[str, Any], planned: tuple[int, int]) -> dict[str, Any]:
    """Compare a checkpoint's figures with its card's perplexity and with the zeros of our plan.

    Args:
        series: The checkpoint's name in the series.
        figures: The result of `evaluate` for it on `data=wikitext`.
        planned: The result of `planned_zeros` for it.

    Returns:
        The card's perplexity, the relative difference of each measured perplexity from it (None if not finite), the nearest
        convention, the measured and the planned share of zeros, and the zeros of each kind of layer.
    """
    card = CARD_PERPLEXITY[series]
    differences = {name: figures[name] / card - 1 for name in PERPLEXITIES if math.isfinite(figures[name])}
    num_zeros, num_weights = planned
    return {
        "name": series,
        "card_perplexity": card,
        "differences": {name: differences.get(name) for name in PERPLEXITIES},
        "nearest": min(differences, key=lambda name: abs(differences[name]), default=None),
        "sparsity": figures["sparsity"],
        "planned_sparsity": num_zeros / num_weights,
        "planned_zero_linear_params": num_zeros,
        "planned_linear_params": num_weights,
        "kinds": zeros_by_kind(figures),
    }


def series_text(found: dict[str, Any], figures: dict[str, Any]) -> str:
    """Return the comparison as two tables: measured and published perplexities, measured and planned zeros."""
    card, planned = found["card_perplexity"], found["planned_sparsity"]
    perplexities = [
        [name, half_up(figures[name], 2), half_up(card, 2), "" if share is None else _signed(100 * share) + "%"]
        for name, share in found["differences"].items()
    ]
    kinds = found["kinds"]
    layers = sum(kind["layers"] for kind in kinds.values())
    counted = {"layers": layers, "weights": figures["linear_params"], "zeros": figures["zero_linear_params"]}
    rows = {**kinds, "all": {**counted, "share": found["sparsity"]}}
    zeros = [
        [
            name,
            str(row["layers"]),
            f"{row['weights']:,}",
            f"{row['zeros']:,}",
            percent_text(row["share"]),
            _signed(100 * (row["share"] - planned)),
        ]
        for name, row in rows.items()
    ]
    lines = [
        f"{found['name']} beside its card (nearest: {found['nearest'] or 'none is finite'}):",
        markdown_table(["perplexity", "here", "card", "difference"], perplexities),
        f"and beside our plan, {found['planned_zero_linear_params']:,} zeros of {found['planned_linear_params']:,} linear "
        f"weights ({percent_text(planned)}) under one threshold:",
        markdown_table(["layers", "number", "weights", "zeros", "share", "points from the plan"], zeros),
    ]
    if figures["linear_params"] != found["planned_linear_params"]:
        lines.append("This model has another size than the plan's: only shares can be compared.")
    return "\n".join(lines)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + half_up(value, 2)
