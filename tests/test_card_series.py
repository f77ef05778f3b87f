"""The runs that a model card compares with its own: the sweep, the dense twin, and runs that only kept zeros."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from tests.cards import compose_run, finish_run, line_of, make_card, make_summary
from train.record.card import card_text
from train.record.siblings import counterpart, find_siblings, has_sparse_weights, match_words


def test_siblings_have_their_lines_and_this_run_stands_out():
    _, plan = compose_run()
    lighter = make_summary(plan, run_name="lighter", sparsity=0.5, perplexity=9.5)
    card = make_card(siblings=[make_summary(plan, run_name="plain", prune_start_step=None, sparsity=0.0), lighter])
    names = re.findall(r"^\| (\S+) +\|.*%", card.split("## Series")[1], flags=re.MULTILINE)
    assert names == ["lighter", "**tiny**", "plain"]
    assert re.search(r"^\| lighter .*\| 50\.00% .*\| 9\.50 ", card, flags=re.MULTILINE)


def test_a_sibling_scored_on_other_text_is_pointed_out():
    _, plan = compose_run()
    sibling = make_summary(plan, run_name="web", data="fineweb_edu", perplexity_window=2048)
    assert "`web`: scored on fineweb_edu, windows of 2048 tokens." in make_card(siblings=[sibling])


def test_siblings_are_the_finished_runs_of_the_sweep(tmp_path):
    _, plan = compose_run()
    for name in ("tiny", "b", "a"):
        finish_run(tmp_path / "sweep" / name, make_summary(plan, run_name="as configured"))
    finish_run(tmp_path / "sweep" / "older", {"run_name": "older"})
    (tmp_path / "sweep" / "unfinished").mkdir()
    found = find_siblings(tmp_path / "sweep" / "tiny", tmp_path)
    assert [sibling["run_name"] for sibling in found] == ["a", "b"]


def test_outside_a_sweep_only_the_twin_is_a_sibling(tmp_path):
    _, plan = compose_run()
    for name in ("tiny", "tiny-small-dense", "another"):
        finish_run(tmp_path / name, make_summary(plan))
    assert [sibling["run_name"] for sibling in find_siblings(tmp_path / "tiny", tmp_path)] == ["tiny-small-dense"]
    assert [sibling["run_name"] for sibling in find_siblings(tmp_path / "tiny-small-dense", tmp_path)] == ["tiny"]


def test_a_dense_runs_card_has_no_prune_window():
    card = make_card("sparsity.target=0")
    assert "Pruning" not in card
    assert "Matching dense model" not in card
    assert "Dense twin" not in card
    assert line_of(card, "Sparsity configuration") == "none, dense throughout"
    tags = ModelCard(card).data.tags
    assert "dense" in tags
    assert not {"sparse", "pruning"} & set(tags)


def test_a_twins_card_names_what_it_is_the_twin_of():
    sparse, twin = compose_run(), compose_run("model.match=average")
    alone = make_card("model.match=average")
    assert "Pruning" not in alone
    assert line_of(alone, "Dense twin of").startswith("`llama-tiny` pruned to 75%, 10.17K linear")
    source = make_summary(sparse[1], run_name="job-7")
    beside = card_text(*twin, make_summary(twin[1]), [source])
    assert line_of(beside, "Dense twin of").startswith("`job-7`, 10.17K linear")


def test_a_small_dense_run_is_by_its_name_the_twin_of_the_sparse_one():
    card = make_card("sparsity.target=0", "run_name=big-80p-small-dense")
    assert line_of(card, "Dense twin of") == "`big-80p`, by its name"


def test_a_sparse_runs_card_names_its_dense_twin():
    assert line_of(make_card(), "Matching dense model").startswith("none found among the finished runs")
    dense = make_summary(compose_run("model.match=average")[1], linear_params=9999)
    assert dense["run_name"] == "tiny-twin"
    assert line_of(make_card(siblings=[dense]), "Matching dense model").startswith(
        "`tiny-twin`, 10.00K linear parameters, compared with this run's 10.17K"
    )


@pytest.mark.parametrize(
    ("dense", "matches"),
    [
        ({"run_name": "run-small-dense", "linear_params": 1, "total_tokens": 1}, True),
        ({"run_name": "other", "linear_params": 1049, "total_tokens": 5000}, True),
        ({"run_name": "other", "linear_params": 951, "total_tokens": 5000}, True),
        ({"run_name": "other", "linear_params": 1051, "total_tokens": 5000}, False),
        ({"run_name": "other", "linear_params": 1000, "total_tokens": 4999}, False),
        ({"run_name": "other", "linear_params": 1000, "total_tokens": 5000, "prune_start_step": 7}, False),
    ],
)
def test_a_twin_is_told_by_its_name_or_by_its_size(dense, matches):
    # The average counts for the sparse run, and the size for the dense one.
    dense = {"prune_start_step": None, "avg_linear_params": dense["linear_params"], **dense}
    sparse = {
        "run_name": "run",
        "prune_start_step": 5,
        "linear_params": 4000,
        "avg_linear_params": 1000.0,
        "total_tokens": 5000,
    }
    assert (counterpart(sparse, [dense]) is dense) == matches
    assert (counterpart(dense, [sparse]) is sparse) == (matches and dense["prune_start_step"] is None)


@pytest.mark.parametrize(
    ("figures", "sparse"),
    [
        ({"prune_start_step": 5, "sparsity": 0.8}, True),
        ({"prune_start_step": 5}, True),
        ({"prune_start_step": None, "sparsity": 0.8}, True),
        ({"prune_start_step": None, "sparsity": 1e-5}, False),
        ({"prune_start_step": None, "sparsity": 0.0}, False),
        ({}, False),
    ],
)
def test_weights_are_sparse_by_pruning_or_by_the_zeros_they_kept(figures, sparse):
    assert has_sparse_weights(figures) is sparse


def test_a_run_that_kept_the_zeros_of_another_is_nobodys_twin():
    config, plan = compose_run("sparsity.target=0")
    assert plan.schedule is None
    tuned = make_summary(plan, run_name="tuned", sparsity=0.8)
    pruned = {**tuned, "run_name": "pruned", "prune_start_step": 5}
    dense = {**tuned, "run_name": "plain", "sparsity": 0.0}
    assert counterpart(pruned, [tuned]) is None
    assert counterpart(pruned, [tuned, dense]) is dense
    assert match_words(config, plan, tuned, [pruned, dense]) is None


def test_the_card_of_a_run_that_kept_the_zeros_of_another_calls_it_sparse():
    card = make_card("sparsity.target=0", sparsity=0.8)
    assert "sparse because it kept the zeros of the model it started from: 80.00%" in card
    assert line_of(card, "Model type").startswith("sparse causal")
    assert line_of(card, "Sparsity configuration") == "the zeros it started with, kept"
    assert "Pruning start step" not in card
    assert "- sparse\n" in card
    assert "- pruning\n" not in card
