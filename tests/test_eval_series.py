"""`python -m eval series=NAME`: a published checkpoint compared with its card and our plan, on a stand-in folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.compose import composed
from conf.schema.evaluation import SERIES
from eval.model.series import CARD_PERPLEXITY, compare_with_card, planned_zeros, series_text, with_series_defaults
from tests.commands import run_command
from tests.small_models import llama, prune, saved
from tests.test_bad_input import the_error

LAYERS = {
    "model.layers.0.self_attn.q_proj.weight": 90,
    "model.layers.1.self_attn.q_proj.weight": 70,
    "lm_head.weight": 20,
}


def figures(**changes: Any) -> dict[str, Any]:
    """Return the figures of a model with three layers of 100 weights, 180 of them zero."""
    return {
        "word_perplexity": 20.80 * 1.05,
        "token_perplexity": 10.40,
        "token_perplexity_stride512": 9.0,
        "layer_zeros": LAYERS,
        "layer_weights": dict.fromkeys(LAYERS, 100),
        "linear_params": 300,
        "zero_linear_params": 180,
        "sparsity": 0.6,
        **changes,
    }


def test_each_published_name_has_a_card():
    assert tuple(CARD_PERPLEXITY) == SERIES


def test_the_name_alone_chooses_the_model_and_the_text():
    assert with_series_defaults(["series=sparsellm-1b-60p"]) == [
        "model=tjingrant/sparsellm-1b-60p",
        "data=wikitext",
        "series=sparsellm-1b-60p",
    ]
    given = ["series=sparsellm-1b-60p", "model=here", "data=wikitext"]
    assert with_series_defaults(given) == given
    assert with_series_defaults(["model=here"]) == ["model=here"]


@pytest.mark.parametrize(
    ("name", "planned"),
    [
        # Linear weights of LLaMA2-1B with its head: 1.14B on the cards.
        ("sparsellm-1b-60p", (round(0.6 * 1_139_277_824), 1_139_277_824)),
        ("sparsellm-1b-80p", (round(0.8 * 1_139_277_824), 1_139_277_824)),
    ],
)
def test_the_plan_ends_with_the_zeros_of_the_card(name, planned):
    assert planned_zeros(name) == planned


def test_a_dense_twin_is_planned_without_zeros():
    assert planned_zeros("sparsellm-1b-60p-small-dense")[0] == 0


def test_perplexities_and_zeros_are_held_against_card_and_plan():
    found = compare_with_card("sparsellm-1b-60p", figures(), (120, 300))
    assert found["card_perplexity"] == 20.80
    assert found["differences"]["word_perplexity"] == pytest.approx(0.05)
    assert found["differences"]["token_perplexity"] == pytest.approx(-0.5)
    assert found["nearest"] == "word_perplexity"
    assert found["kinds"] == {
        "q_proj": {"layers": 2, "weights": 200, "zeros": 160, "share": 0.8},
        "lm_head": {"layers": 1, "weights": 100, "zeros": 20, "share": 0.2},
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in series_text(found, figures()).splitlines()
    ]
    assert ["word_perplexity", "21.84", "20.80", "+5.00%"] in rows
    assert ["q_proj", "2", "200", "160", "80.00%", "+40.00"] in rows
    assert ["lm_head", "1", "100", "20", "20.00%", "-20.00"] in rows
    assert ["all", "3", "300", "180", "60.00%", "+20.00"] in rows


def test_a_perplexity_that_is_not_finite_has_no_difference():
    found = compare_with_card("sparsellm-1b-60p", figures(word_perplexity=float("inf")), (180, 300))
    assert found["differences"]["word_perplexity"] is None
    assert found["nearest"] == "token_perplexity"
    assert "| word_perplexity " in series_text(found, figures(word_perplexity=float("inf")))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    model = llama()
    prune(model, 0.5)
    return saved(model, tmp_path_factory.mktemp("series") / "model")


def test_the_command_takes_a_stand_in_folder(stand_in):
    asked = ["eval", "series=sparsellm-1b-60p", f"model={stand_in}", f"data.path={stand_in.parent}/text.raw"]
    done = run_command([*asked, "format=json"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["series"]["sparsity"] == found["sparsity"] == 0.5
    assert found["series"]["planned_sparsity"] == pytest.approx(0.6, abs=1e-8)
    assert found["series"]["kinds"]["q_proj"]["share"] == 0.5
    assert found["series"]["differences"]["word_perplexity"] == found["word_perplexity"] / 20.80 - 1
    done = run_command(asked)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sparsellm-1b-60p beside its card (nearest: " in done.stdout
    assert "only shares can be compared" in done.stdout


def test_without_a_network_it_says_what_to_run_where():
    done = run_command(["eval", "series=sparsellm-1b-60p"], HF_HUB_CACHE="/nowhere")
    assert the_error(done) == (
        "error: series=sparsellm-1b-60p cannot be fetched because the hub does not answer: run this command on a machine "
        "with a network, or run there `hf download tjingrant/sparsellm-1b-60p --local-dir sparsellm-1b-60p`, copy that "
        "folder here and add model=sparsellm-1b-60p."
    )


def test_other_names_and_other_texts_are_refused():
    with pytest.raises(ValueError, match=r"series=sparsellm-7b is not known: choose one of sparsellm-1b-20p, "):
        composed("eval", ["folder=x", "data=wikitext", "series=sparsellm-7b"])
    with pytest.raises(ValueError, match=r"series=sparsellm-1b-60p is held against .* give data=wikitext and no tasks"):
        composed("eval", ["folder=x", "data=pydocs", "series=sparsellm-1b-60p"])
