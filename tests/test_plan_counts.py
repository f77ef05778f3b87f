"""Closed-form counts equal those of the models that transformers builds."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from conf.schema import ModelConfig, SparsityConfig
from sparsity.prunable import prunable_parameters
from train.model.build import llama_config
from train.plan.counts import count_parameters
from train.plan.names import count_prunable, parameter_shapes

MODELS = sorted((Path(__file__).resolve().parents[1] / "conf" / "model").glob("llama*.yaml"))
GROUPED_TIED = ModelConfig(
    name="grouped-tied",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def load(file: Path) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(file.read_text()))


def on_meta(model: ModelConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config(model))


@pytest.mark.parametrize("model", [*map(load, MODELS), GROUPED_TIED], ids=lambda model: model.name)
def test_counts_equal_a_meta_model(model):
    llama = on_meta(model)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in llama.parameters())
    prunable = prunable_parameters(llama) if not model.tie_word_embeddings else None
    if prunable is not None:
        assert counts.linear == sum(p.numel() for p in prunable.values()) == count_prunable(model, SparsityConfig())
    named = {name: tuple(p.shape) for name, p in llama.named_parameters(remove_duplicate=False)}
    assert dict(parameter_shapes(model)) == named


@pytest.mark.parametrize(
    ("include", "requires_dense"),
    [
        (None, []),
        (None, ["lm_head*"]),
        (["*mlp*"], []),
        (["*embed_tokens*", "lm_head*"], []),
        (["*"], ["*norm*", "*q_proj*"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:lm_head.weight shares")
def test_prunable_weights_are_counted_by_the_patterns_of_the_pruner(include, requires_dense, tied):
    model = ModelConfig(**{**vars(GROUPED_TIED), "tie_word_embeddings": tied})
    chosen = prunable_parameters(on_meta(model), include, requires_dense)
    sparsity = SparsityConfig(target=0.5, include=include, requires_dense=requires_dense)
    assert count_prunable(model, sparsity) == sum(p.numel() for p in chosen.values())


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match=r"sparsity.include=\*qproj"):
        count_prunable(GROUPED_TIED, SparsityConfig(target=0.5, include=["*qproj*"]))


def test_published_sizes():
    totals = {load(file).name: count_parameters(load(file)).total for file in MODELS}
    assert totals["llama2-1b"] == 1_204_881_408
    assert totals["llama2-7b"] == 6_738_415_616
    assert totals["llama2-70b"] == 68_976_648_192
    linear = {load(file).name: count_parameters(load(file)).linear for file in MODELS}
    assert [linear[f"llama-{size}"] for size in ("58m", "162m", "468m")] == [41_549_824, 137_822_208, 435_421_184]
