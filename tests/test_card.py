"""The model card: what it states, what it leaves open, and its code for users."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load

from conf.schema import Config
from sparsity.prunable import linear_weights
from tests.cards import compose_run, line_of, make_card, make_summary
from train.data.tokenizer import train_bpe, wrap_bpe
from train.distributed import World
from train.model.build import build_model
from train.model.export import export_model
from train.plan.run import RunPlan
from train.record.card import write_card
from train.record.directory import RunDirectory


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
