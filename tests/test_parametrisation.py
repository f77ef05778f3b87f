"""The authors' parametrisation: initial weights, folded query weights in training, and plain ones in every file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.compose import composed
from conf.schema import ModelConfig
from sparsity import Geometric, SparsityCallback
from tests.cards import compose_run, line_of, make_card
from tests.commands import run_command
from tests.distributed import run_ranks
from tests.interrupted import interrupted, one_error, records_of, tensors_of
from tests.processes import launched
from tests.test_export import tokenizer_in
from train.distributed import World
from train.model.build import build_model, build_skeleton
from train.model.export import export_model, full_names, full_tensor
from train.model.initial import initial_weights
from train.model.parametrisation import fold_queries, query_folds
from train.model.weights import allocate, draw_weights
from train.plan.choices import choice_words
from train.plan.run import plan_run
from train.plan.twin import dense_twin

# A module's first test waits for several launches.
pytestmark = pytest.mark.timeout(900)
AUTHORS = ("recipe=authors",)
"""The override for the authors' initial weights, query scale and documents."""
IDS = torch.arange(24).view(2, 12) % 61
CPU = torch.device("cpu")
ONE = World(0, 1, CPU)
HEAD_DIMS = (4, 6, 16)
"""Head sizes with the square roots 2, 2.449... and 4."""


def model_config(head_dim: int = 16, **changes: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 300, "hidden_size": 4 * head_dim, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    return ModelConfig(name="tiny", **{**sizes, **changes})


def folded_config(head_dim: int = 16, **changes: Any) -> ModelConfig:
    return model_config(head_dim, query_scale="folded", **changes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def test_every_kernel_is_drawn_by_its_fan_in_and_cut_off_at_two_standard_deviations(tokenizer):
    weights = weights_of(build_model(model_config(64, init="authors"), tokenizer, seed=0))
    kernels = {name: w for name, w in weights.items() if "proj" in name or name == "lm_head.weight"}
    assert len(kernels) == 2 * 7 + 1
    assert {w.shape[1] for w in kernels.values()} == {256}
    for name, weight in kernels.items():
        # The deviation is 1/16 after the cut, so 1/16 / 0.8796... before it.
        bound = 2 / 16 / 0.87962566103423978
        assert float(weight.std()) == pytest.approx(1 / 16, rel=0.02), name
        assert abs(float(weight.mean())) < 4 / 16 / weight.numel() ** 0.5, name
        assert 0.98 * bound < float(weight.abs().max()) <= bound, name
        # A normal distribution has 68.27 % within one standard deviation and 95.45 % within two.
        assert float((weight.abs() < bound / 2).float().mean()) == pytest.approx(0.6827 / 0.9545, abs=0.01), name
    embedding = weights["model.embed_tokens.weight"]
    assert float(embedding.std()) == pytest.approx(1.0, rel=0.02)
    assert float(embedding.abs().max()) > 3
    assert all((w == 1).all() for name, w in weights.items() if "norm" in name)


def test_kernels_of_more_inputs_are_smaller(tokenizer):
    weights = weights_of(build_model(model_config(16, intermediate_size=1024, init="authors"), tokenizer, seed=1))
    assert float(weights["model.layers.0.mlp.down_proj.weight"].std()) == pytest.approx(1 / 32, rel=0.02)
    assert float(weights["model.layers.0.mlp.up_proj.weight"].std()) == pytest.approx(1 / 8, rel=0.02)


def drawn_over_ranks() -> dict[str, Tensor]:
    """Shard a folded model over all ranks, draw its weights as the authors do, and return them gathered."""
    import tempfile

    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_in(Path(folder))
    config = folded_config(6, init="authors")
    model = build_skeleton(config, tokenizer)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    allocate(model, CPU)
    draw_weights(model, build_skeleton(config, tokenizer), 3, config.init)
    folds = query_folds(model)
    assert list(folds.values()) == [math.sqrt(6)] * 2
    assert folds.keys() < full_names(model).keys()
    return {name: full_tensor(tensor) for name, tensor in full_names(model).items()}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_draws_the_folded_weights_of_one_process(tokenizer, num_ranks):
    expected = weights_of(build_model(folded_config(6, init="authors"), tokenizer, seed=3))
    for found in run_ranks(drawn_over_ranks, num_ranks):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("init", ["transformers", "authors"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_folded_model_draws_smaller_queries_and_computes_the_same_function(tokenizer, init, head_dim):
    plain = build_model(model_config(head_dim, init=init), tokenizer, seed=0)
    model = build_model(folded_config(head_dim, init=init), tokenizer, seed=0)
    ours, theirs = weights_of(model), weights_of(plain)
    for name, weight in theirs.items():
        expected = weight / math.sqrt(head_dim) if "q_proj" in name else weight
        assert torch.equal(ours[name], expected), name
    assert {layer.self_attn.scaling for layer in model.model.layers} == {1.0}
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_exported_model_is_plain_has_the_trained_models_logits_and_its_zeros(
    tokenizer, tmp_path, head_dim, attention
):
    model = build_model(folded_config(head_dim, init="authors", attn_implementation=attention), tokenizer, seed=0)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    callback.pruner.prune(0.85)
    export_model(model, tokenizer, tmp_path / "model", dtype="float32", max_shard_size="20KB", world=ONE)
    assert "query" not in (tmp_path / "model" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=attention)
    assert {layer.self_attn.scaling for layer in loaded.model.layers} == {head_dim**-0.5}
    exported = weights_of(loaded)
    for name, weight in weights_of(model).items():
        expected = weight * math.sqrt(head_dim) if "q_proj" in name else weight
        assert torch.equal(exported[name], expected), name
        assert torch.equal(exported[name] == 0, weight == 0), name
        assert "q_proj" not in name or 0.1 < float((weight == 0).float().mean()) < 0.9, name
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_init_from_folds_what_it_reads(tokenizer, tmp_path, head_dim):
    source = build_model(folded_config(head_dim, init="authors"), tokenizer, seed=0)
    with torch.no_grad():
        source.model.layers[0].self_attn.q_proj.weight.view(-1)[::3] = 0
    export_model(source, tokenizer, tmp_path / "model", dtype="float32", max_shard_size="5GB", world=ONE)
    target = build_model(folded_config(head_dim), tokenizer, seed=5)
    initial_weights(target, str(tmp_path / "model")).fill(target)
    before, after = weights_of(source), weights_of(target)
    for name, weight in before.items():
        assert torch.equal(after[name] == 0, weight == 0), name
        # To multiply and divide by a power of two is exact; with sqrt(6) each is rounded once.
        error = 0.0 if "q_proj" not in name or head_dim != 6 else 2.0**-23
        torch.testing.assert_close(after[name], weight, rtol=error, atol=0.0)
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").bfloat16().save_pretrained(tmp_path / "narrow")
    initial_weights(target, str(tmp_path / "narrow")).fill(target)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(target.get_parameter(name), narrow[name].float() / math.sqrt(head_dim))


def test_folded_weights_reach_the_files_of_bfloat16_rounded_once(tokenizer, tmp_path):
    model = build_model(folded_config(6), tokenizer, seed=0)
    export_model(model, tokenizer, tmp_path / "model", dtype="bfloat16", max_shard_size="5GB", world=ONE)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = load_file(tmp_path / "model" / "model.safetensors")[name]
    assert torch.equal(found, (model.get_parameter(name).detach() * math.sqrt(6)).bfloat16())


def test_the_threshold_compares_the_folded_weights(tokenizer):
    kept = {}
    for config in (model_config(16, init="authors"), folded_config(16, init="authors")):
        model = build_model(config, tokenizer, seed=0)
        callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
        callback.bind(model)
        callback.pruner.prune(0.5)
        found = callback.pruner.layer_densities()
        kept[config.query_scale] = found["model.layers.0.self_attn.q_proj.weight"]
        assert found["model.layers.0.self_attn.k_proj.weight"] > 0.4
    assert kept["standard"] > 0.4
    assert kept["folded"] < 0.15


def test_wrapped_modules_are_found_by_their_plain_names(tokenizer):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build_model(model_config(16), tokenizer, seed=0)
    assert query_folds(model) == {}
    fold_queries(model)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1].self_attn = checkpoint_wrapper(model.model.layers[1].self_attn)
    assert query_folds(model) == dict.fromkeys(names, 4.0)


def test_a_dense_twin_keeps_both_choices_and_folds_by_its_own_head_width(tokenizer):
    twin = dense_twin(folded_config(16, init="authors"), 0.4).model
    assert (twin.init, twin.query_scale) == ("authors", "folded")
    assert twin.hidden_size // twin.num_attention_heads == 10
    folds = query_folds(build_skeleton(twin, tokenizer))
    assert set(folds.values()) == {math.sqrt(10)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "jax"}, "model.init=jax is not known: choose one of transformers, authors"),
        ({"query_scale": "none"}, "model.query_scale=none is not known: choose one of standard, folded"),
        ({"init": "authors", "initializer_range": 0.01}, "model.initializer_range=0.01 has no effect with model.init=authors"),
        ({"init": "authors", "tie_word_embeddings": True}, "model.init=authors draws embedding and lm_head from different"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused_in_a_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        model_config(**changes)


def test_card_and_plan_name_the_parametrisation():
    card = make_card(*AUTHORS)
    assert "with variance 1/fan-in" in line_of(card, "Initial weights")
    assert "sqrt(head size) times smaller than in these files" in line_of(card, "Query weights")
    assert "Query weights" not in make_card()
    config, _ = compose_run(*AUTHORS)
    words = choice_words(config, prunes=True)
    assert ["model.init=authors" in words[0], "model.query_scale=folded" in words[1]] == [True, True]
    assert len(choice_words(replace(config, init_from="model"), prunes=True)) == len(words) - 1
    done = run_command(["launch.plan", "experiment=demo", *AUTHORS])
    assert "model.query_scale=folded" in done.stdout, done.stderr
    assert "model.init=authors" in done.stdout
    plan = plan_run(composed("train", ["experiment=demo", *AUTHORS, "model.match=average"]), 1)
    assert plan.model.query_scale == "folded"


@pytest.fixture(scope="module")
def authors(folder) -> Path:
    """Do a sparse run on two ranks without an interruption."""
    done = run_command(["launch", *interrupted(folder, "authors", "logger=none", *AUTHORS)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model.query_scale=folded" in done.stdout
    return folder / "runs" / "authors"


def test_a_killed_run_with_folded_queries_resumes_to_the_same_bits(folder, authors):
    run_dir = folder / "runs" / "authors-killed"
    command = interrupted(folder, "authors-killed", "logger=none", *AUTHORS)
    with launched(command, run_dir) as run:
        run.wait_for_step(30)
        run.kill_all()
    with launched(command, run_dir) as run:
        assert run.wait() == 0, run.stderr[-3000:]
        assert "resumed from" in run.stdout
    assert records_of(run_dir) == records_of(authors)
    for pattern in ("model/*.safetensors", "checkpoints/checkpoint-60/rank-*.safetensors"):
        assert tensors_of(run_dir, pattern) == tensors_of(authors, pattern)


def test_eval_of_the_exported_model_gives_the_runs_own_figures(folder, authors):
    summary = json.loads((authors / "summary.json").read_text())
    options = [f"{key}={value}" for key, value in summary["eval_overrides"].items()]
    done = run_command(["eval", f"model={authors}/model", "data=text", *options, "format=json"])
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    for name in ("perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(summary[name], rel=1e-5)
    assert figures["zero_linear_params"] == summary["linear_params"] - summary["nonzero_linear_params"]
    assert len(summary["choices"]) == 5
    assert summary["eval_overrides"]["data.attention"] == "document"


def test_one_process_trains_what_two_train(folder, authors):
    command = interrupted(folder, "authors-one", "logger=none", "launch.num_processes=1", *AUTHORS)
    done = run_command(["launch", *command])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        json.loads((folder / "runs" / name / "summary.json").read_text()) for name in ("authors-one", "authors")
    )
    for name in ("final_train_loss", "perplexity", "bits_per_byte"):
        assert one[name] == pytest.approx(two[name], rel=2e-3)
    # At the first event both have seen 20 steps; the masks before it are the same.
    assert one["nonzero_linear_params"] == two["nonzero_linear_params"]


def test_a_run_that_starts_from_it_keeps_its_zeros_in_either_scale(folder, authors):
    before = load_file(authors / "model" / "model.safetensors")
    for name, choices in (("authors-more", AUTHORS), ("authors-plain", ())):
        start = ("logger=none", "sparsity=dense", f"init_from={authors}/model", "trainer.max_steps=4", *choices)
        command = [item for item in interrupted(folder, name, *start) if not item.startswith("sparsity.")]
        done = run_command(["launch", *command])
        assert done.returncode == 0, done.stderr[-3000:]
        after = load_file(folder / "runs" / name / "model" / "model.safetensors")
        for weight in (key for key in before if "proj" in key or key == "lm_head.weight"):
            assert torch.equal(after[weight] == 0, before[weight] == 0), (name, weight)
        # The first logged loss is near that of the initial model, in either scale.
        first = json.loads((folder / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])
        assert first["train/loss"] < 3


def test_another_parametrisation_is_another_run(folder, authors):
    error = one_error(interrupted(folder, "authors", "logger=none", "model.init=authors"))
    assert "model.query_scale was folded, is standard" in error
