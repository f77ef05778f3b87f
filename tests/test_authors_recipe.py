"""recipe=authors sets the choices of the paper's authors; experiments that reproduce them use it, and the plan says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import composed
from train.plan.run import plan_run
from train.plan.series import table_row
from train.plan.text import series_text

EXPERIMENTS = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith(("sparsellm", "paper", "journey"))])
def test_what_reproduces_the_paper_takes_the_authors_recipe(name):
    config = composed("train", [f"experiment={name}"])
    assert config.recipe == "authors"
    assert (config.model.init, config.model.query_scale) == ("authors", "folded")
    data = config.data
    assert (data.bos, data.eos, data.max_document_tokens, data.attention) == (True, True, 2049, "document")
    # The model cards name FineWeb-Edu; the paper used C4.
    if name.startswith("sparsellm"):
        assert data.source == "fineweb_edu"
    elif name.startswith("paper"):
        assert (data.name, data.subset) == ("allenai/c4", "en")


def test_the_demo_and_a_run_without_an_experiment_are_plain():
    for config in (composed("train", ["experiment=demo"]), composed("train", [])):
        assert config.recipe == "plain"
        assert (config.model.init, config.model.query_scale, config.data.attention) == (
            "transformers",
            "standard",
            "causal",
        )


def test_the_recipe_and_each_of_its_keys_can_be_given():
    plain = composed("train", ["experiment=journey", "recipe=plain"])
    assert (plain.recipe, plain.model.init, plain.data.bos) == ("plain", "transformers", False)
    mixed = composed("train", ["recipe=authors", "data.attention=causal"])
    assert (mixed.model.init, mixed.data.bos, mixed.data.attention) == ("authors", True, "causal")


def test_the_plan_names_the_recipe():
    configs = [composed("train", ["experiment=journey", *more]) for more in ([], ["recipe=plain"])]
    rows = [table_row(config, plan_run(config, 1)) for config in configs]
    assert [row["recipe"] for row in rows] == ["authors", "plain"]
    assert "Trained by recipe=authors." in " ".join(series_text(rows[:1]).split())
    assert "By recipe: llama-micro-80p authors, llama-micro-80p plain." in " ".join(series_text(rows).split())


def test_an_attention_of_ones_own_is_refused_with_documents():
    with pytest.raises(ValueError, match=r"model\.attn_implementation=eager would be ignored: leave"):
        composed("train", ["recipe=authors", "model.attn_implementation=eager"])
    assert composed("train", ["recipe=authors", "model.attn_implementation=sdpa"]).data.attention == "document"
