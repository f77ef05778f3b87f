"""The model card: what it states, what it leaves open, and that it never makes a finished run fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from hydra import compose, initialize_config_module

import train.record.finish
from conf import cli, schema
from conf.schema import CardConfig, Config
from sparsity.prunable import linear_weights
from train.data import hub
from train.data.tokenizer import train_bpe, wrap_bpe
from train.distributed import World
from train.model.build import build_model
from train.model.export import export_model
from train.plan.run import RunPlan, plan_run
from train.record.card import card_text, write_card
from train.record.directory import RunDirectory, run_identity
from train.record.publish import push_to_hub, renew_card
from train.record.siblings import counterpart, find_siblings, has_sparse_weights, match_words

TINY = (
    "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1",
    "model.num_attention_heads=2", "model.num_key_value_heads=2", "model.max_position_embeddings=32",
    "batch_size=8", "trainer.max_steps=1000", "sparsity.target=0.75", "sparsity.window.start=200",
    "sparsity.window.end=600", "sparsity.window.every=50", "sparsity.window.of=steps",
)  # fmt: skip


def compose_run(*overrides: str) -> tuple[Config, RunPlan]:
    schema.register()
    with initialize_config_module(config_module="conf", version_base="1.3"):
        config = cli.typed(compose("train", overrides=[*TINY, "run_name=tiny", *overrides]))
    return config, plan_run(config, world_size=1)


def make_summary(plan: RunPlan, **changes: Any) -> dict[str, Any]:
    """Return figures that a run with this plan might have measured."""
    schedule, linear = plan.schedule, plan.counts.linear
    return {
        "run_name": plan.run_dir.name,
        "data": "pydocs",
        "world_size": 2,
        "fsdp_version": 2,
        "total_params": plan.counts.total,
        "linear_params": linear,
        "nonzero_linear_params": linear // 4 if schedule else linear,
        "sparsity": 0.75 if schedule else 0.0,
        "average_density": plan.average_density,
        "avg_linear_params": plan.average_density * linear,
        "steps": plan.num_steps,
        "batch_tokens": plan.batch_tokens,
        "total_tokens": plan.total_tokens,
        "learning_rate": 3e-4,
        "final_train_loss": 2.22745,
        "final_train_loss_std": 0.02114,
        "heldout_loss": 2.31549,
        "perplexity": 10.129846,
        "perplexity_window": 32,
        "bits_per_byte": 1.234561,
        "unigram_bits_per_byte": 3.456789,
        "heldout_tokens": 12345,
        "heldout_bytes": 54321,
        "prune_start_step": schedule.start_step if schedule else None,
        "prune_end_step": schedule.end_step if schedule else None,
        "prune_every_steps": schedule.every_steps if schedule else None,
        "seconds": 5400.0,
        **changes,
    }


def make_card(*overrides: str, siblings: Sequence[dict[str, Any]] = (), **changes: Any) -> str:
    config, plan = compose_run(*overrides)
    return card_text(config, plan, make_summary(plan, data=config.data.source, **changes), siblings)


def line_of(card: str, name: str) -> str:
    """Return the bullet called `name`."""
    (line,) = re.findall(rf"^- \*\*{re.escape(name)}:\*\* (.*)$", card, flags=re.MULTILINE)
    return line


def finish_run(folder: Path, summary: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_hub_reads_the_header(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(make_card("data=fineweb_edu", "card.license=apache-2.0"))
    data = ModelCard.load(path).data
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", "en")
    assert (data.license, data.datasets, data.metrics) == ("apache-2.0", ["HuggingFaceFW/fineweb-edu"], ["perplexity"])
    assert {"sparsellm", "llama", "sparse", "pruning", "magnitude-pruning"} <= set(data.tags)
    assert data.model_name == "tiny"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "perplexity": 10.129846,
        "bits_per_byte": 1.234561,
    }
    assert {(result.dataset_type, result.dataset_config) for result in data.eval_results} == {
        ("HuggingFaceFW/fineweb-edu", "sample-100BT")
    }
    assert metadata_load(path) == data.to_dict()


def test_every_figure_is_the_summarys():
    # 300 x 32 for each embedding, 4 x 32 x 32 and 3 x 32 x 64 in the layer, 3 norms of 32.
    card = make_card(nonzero_linear_params=4961, average_density=0.54321, avg_linear_params=10777.3)
    assert line_of(card, "Total parameters") == "29,536 (29.54K)"
    assert line_of(card, "Linear parameters").startswith("19,840 (19.84K): ")
    assert line_of(card, "Non-zero linear parameters") == "4,961 (4.96K)"
    assert line_of(card, "Sparsity of the linear layers").startswith("75.00%")
    assert line_of(card, "Average linear parameters over training").startswith(
        "10,777 (10.78K), average density 0.5432: the share not yet pruned, averaged over all 1,000 steps"
    )
    assert line_of(card, "Training steps") == "1,000"
    assert line_of(card, "Batch size") == "256 tokens (8 sequences x 32)"
    assert line_of(card, "Learning rate").startswith("3e-4 at its peak, warm-up over 1% of the steps")
    assert line_of(card, "Total training tokens").startswith("256,000 ")
    assert line_of(card, "Final training loss").startswith("2.2275 ± 0.0211 nats per token: mean ± population")
    assert "of the last 10 steps" in line_of(card, "Final training loss")
    assert line_of(card, "Pruning start step").startswith("200,")
    assert line_of(card, "Pruning end step") == "600"
    assert line_of(card, "Pruning interval").startswith("every 50 steps, 9 times in all")
    assert line_of(card, "Run") == "2 processes, FSDP2, 1.50 hours, seed 0"
    assert "| **tiny** | 29.54K" in card


def test_every_held_out_figure_names_its_convention():
    card = make_card()
    table = dict(re.findall(r"^\| ([\w ,-]+) \| ([\d.]+) \| \w.*\w \|$", card, flags=re.MULTILINE))
    assert table == {
        "Perplexity": "10.13",
        "Held-out loss": "2.3155",
        "Bits per byte": "1.2346",
        "Bits per byte, unigram": "3.4568",
    }
    assert "disjoint windows of 32 tokens" in card
    assert "all 12,345 tokens in the same windows, over the 54,321 bytes" in card


def test_no_licence_is_assumed():
    card = make_card()
    assert "license" not in ModelCard(card).data.to_dict()
    assert "none was chosen" in line_of(card, "Licence of this model")
    assert "card.license=apache-2.0" in line_of(card, "Licence of this model")


def test_a_chosen_licence_is_in_the_header_and_in_the_text():
    card = make_card("card.license=other", "card.license_name=house-rules", "card.license_link=LICENSE")
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "house-rules", "LICENSE")
    assert line_of(card, "Licence of this model").startswith("`house-rules` (LICENSE), chosen by")


@pytest.mark.parametrize(
    ("override", "datasets", "terms"),
    [
        ("data=pydocs", None, "under that package's own licence"),
        ("data=fineweb_edu", ["HuggingFaceFW/fineweb-edu"], "ODC-By 1.0"),
        ("data=fineweb_edu", ["HuggingFaceFW/fineweb-edu"], "CommonCrawl's terms"),
        ("data=text", None, "supplied by whoever trained the model"),
    ],
)
def test_the_datas_terms_are_named(override, datasets, terms):
    card = make_card(override, "data.path=corpus" if override == "data=text" else "data.path=null")
    assert ModelCard(card).data.datasets == datasets
    assert terms in line_of(card.split("## Licence and terms")[1], "Training data")


@pytest.mark.parametrize(
    ("tokenizer", "words", "terms"),
    [
        ("train", "trained on this model's training documents", "no terms beyond the data's"),
        ("tjingrant/sparsellm-1b-80p", "LLaMA 2's (`tjingrant/sparsellm-1b-80p`)", "LLaMA 2's, under Meta's [LLaMA 2"),
        ("meta-llama/Llama-2-7b-hf", "LLaMA 2's (`meta-llama/Llama-2-7b-hf`)", "LLaMA 2's, under Meta's [LLaMA 2"),
        ("some/where/llama2.tokenizer.model", "LLaMA 2's (`llama2.tokenizer.model`)", "LLaMA 2's, under Meta's"),
        ("some/where/Llama-2-7b/tokenizer.model", "LLaMA 2's (`tokenizer.model`)", "LLaMA 2's, under Meta's"),
        ("openai-community/gpt2", "taken over (`openai-community/gpt2`)", "under its publisher's terms"),
        ("someone/llama-20b", "taken over (`someone/llama-20b`)", "under its publisher's terms"),
    ],
)
def test_the_tokenizers_terms_are_named(tokenizer, words, terms):
    model, licence = make_card(f"tokenizer={tokenizer}").split("## Licence and terms")
    assert words in line_of(model, "Tokenizer")
    assert terms in line_of(licence, "Tokenizer")


def test_no_path_of_the_machine_is_told():
    card = make_card(
        "runs_dir=/home/lovelace/runs", "tokenizer=/home/lovelace/tok", "data=text", "data.path=/home/lovelace/books"
    )
    assert "lovelace" not in card
    assert "/home" not in card


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


def test_a_diverged_run_gets_a_card_too():
    nan, inf = float("nan"), float("inf")
    card = make_card(
        final_train_loss=nan, final_train_loss_std=nan, heldout_loss=inf, perplexity=inf, bits_per_byte=inf
    )
    assert line_of(card, "Final training loss").startswith("not finite ± not finite")
    assert "model-index" not in ModelCard(card).data.to_dict()


def export_tiny(run_dir: Path, config: Config, plan: RunPlan) -> None:
    run_dir.mkdir(parents=True)
    train_bpe(["the quick brown fox jumps over the lazy dog"] * 20, 300, run_dir / "tokenizer.json")
    tokenizer = wrap_bpe(run_dir / "tokenizer.json", plan.sequence_length)
    model = build_model(plan.model, tokenizer, seed=0)
    with torch.no_grad():
        for weight in linear_weights(model).values():
            weight[torch.rand_like(weight) < 0.75] = 0
    world = World(rank=0, size=1, device=torch.device("cpu"))
    export_model(model, tokenizer, run_dir / "model", dtype="float32", max_shard_size="5GB", world=world)


def test_the_usage_code_runs_when_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, plan = compose_run('prompt="the \\"quick\\" "')
    export_tiny(plan.run_dir, config, plan)
    write_card(config, plan, RunDirectory(plan.run_dir), make_summary(plan))
    card = ModelCard.load(plan.run_dir / "model" / "README.md").text
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'the "quick" ' in done.stdout


def test_the_usage_code_names_the_folder_but_no_absolute_path():
    assert 'name = "runs/tiny/model"' in make_card()
    assert 'name = "tiny/model"' in make_card("runs_dir=/elsewhere/runs")


def test_the_usage_code_loads_from_the_hub_where_an_id_is_given():
    assert 'name = "ada/tiny"' in make_card("card.hub_id=ada/tiny")


@pytest.fixture
def finished(tmp_path):
    """Make a finished run, whose card says that no licence was chosen; return its config, plan, directory and summary."""
    config, plan = compose_run(f"runs_dir={tmp_path}")
    directory = RunDirectory(plan.run_dir)
    directory.model.mkdir(parents=True)
    summary = make_summary(plan)
    write_card(config, plan, directory, summary)
    return config, plan, directory, summary


def test_starting_a_finished_run_again_rewrites_its_card_only_if_asked(finished):
    config, plan, directory, summary = finished
    readme = directory.model / "README.md"
    readme.write_text("edited by hand")
    renew_card(config, plan, directory, summary)
    assert readme.read_text() == "edited by hand"
    config.card = CardConfig(license="mit")
    renew_card(config, plan, directory, summary)
    assert ModelCard.load(readme).data.license == "mit"


def test_a_licence_once_chosen_stays(finished):
    config, plan, directory, summary = finished
    for card in (CardConfig(license="other", license_name="house-rules"), CardConfig(hub_id="ada/tiny")):
        config.card = card
        renew_card(config, plan, directory, summary)
    data = ModelCard.load(directory.model / "README.md").data
    assert (data.license, data.license_name) == ("other", "house-rules")
    assert 'name = "ada/tiny"' in (directory.model / "README.md").read_text()


def test_the_card_is_there_before_the_run_counts_as_finished(finished, monkeypatch):
    config, plan, directory, summary = finished

    def no_card(*_: object) -> None:
        raise OSError("disk full")

    for name in ("write_sample", "read_records", "draw_report", "closing_words"):
        monkeypatch.setattr(train.record.finish, name, lambda *_: "")
    monkeypatch.setattr(train.record.finish, "write_card", no_card)
    recorder: Any = SimpleNamespace(finish=lambda summary: None)
    with pytest.raises(OSError, match="disk full"):
        train.record.finish.finish(config, plan, directory, recorder, summary)
    assert not directory.summary.exists()


def test_a_model_that_cannot_write_a_sample_is_finished_all_the_same(finished, monkeypatch, capsys):
    config, plan, directory, summary = finished

    def no_sample(*_: object) -> None:
        raise RuntimeError("probability tensor contains nan")

    for name in ("read_records", "draw_report", "closing_words", "write_card"):
        monkeypatch.setattr(train.record.finish, name, lambda *_: "")
    monkeypatch.setattr(train.record.finish, "write_sample", no_sample)
    recorder: Any = SimpleNamespace(finish=lambda summary: None)
    train.record.finish.finish(config, plan, directory, recorder, summary)
    assert directory.summary.exists()
    assert "warning: the sample could not be made: probability tensor contains nan" in capsys.readouterr().err


class FakeHub:
    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - one for all, as HfApi is made inside

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_an_upload_is_made_only_when_asked_and_then_private(finished, monkeypatch):
    directory = finished[2]
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    monkeypatch.setattr(FakeHub, "calls", [])
    push_to_hub(CardConfig(hub_id="ada/tiny"), directory.model)
    assert FakeHub.calls == []
    push_to_hub(CardConfig(hub_id="ada/tiny", push_to_hub=True), directory.model)
    hub.is_reachable.cache_clear()
    (repo, options), (_, upload) = FakeHub.calls
    assert (repo, options) == ("ada/tiny", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("ada/tiny", directory.model)


def test_without_a_network_the_upload_says_so_and_leaves_the_run_alone(finished, monkeypatch):
    directory = finished[2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = (directory.model / "README.md").read_text()
    with pytest.raises(
        ValueError, match=r"the run is finished.*not uploaded to ada/tiny.*does not answer.*rerun the same command"
    ):
        push_to_hub(CardConfig(hub_id="ada/tiny", push_to_hub=True), directory.model)
    hub.is_reachable.cache_clear()
    assert (directory.model / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"license": "Apache 2.0"}, "is not a licence identifier"),
        ({"license": "other"}, "needs card.license_name"),
        ({"license_name": "house-rules"}, "set card.license=other"),
        ({"hub_id": "tiny"}, "give OWNER/NAME"),
        ({"push_to_hub": True}, "needs card.hub_id"),
    ],
)
def test_a_card_that_cannot_be_is_refused_before_the_run(override, message):
    with pytest.raises(ValueError, match=message):
        CardConfig(**override)


def test_another_card_does_not_make_another_run():
    assert run_identity(compose_run()[0]) == run_identity(compose_run("card.license=mit")[0])


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
