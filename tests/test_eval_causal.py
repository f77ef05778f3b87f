"""Only models that predict each token from those before it get a perplexity, in windows no longer than their context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BloomConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
    XLNetLMHeadModel,
    set_seed,
)  # fmt: skip

from eval.model.causal import check_architecture, check_reads_no_ahead, logits_change
from eval.model.context import context_of
from eval.model.perplexity import checked, evaluate
from tests.distributed import run_ranks
from tests.small_models import VOCABULARY, gpt2, llama, saved
from tests.test_eval import ALONE, config, figures_of, refused
from train.distributed import World

BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
GEMMA = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 32,
    "initializer_range": 0.3,
}  # fmt: skip
TOKENS = [5, 9, 200, 31, 77, 6]


def two_sided_gemma() -> Any:
    set_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True)).eval()


CONTEXTS = {
    "the text's part": (Gemma3Config(text_config={"max_position_embeddings": 128}), 128),
    "n_positions": (GPT2Config(n_positions=64), 64),
    "the smallest of two names": (GPT2Config(n_positions=64, n_ctx=32), 32),
    "max_seq_len": (MptConfig(max_seq_len=48), 48),
    "a name that the class does not know": (BloomConfig(seq_length=96), 96),
    "a scaled rope": (
        LlamaConfig(
            max_position_embeddings=512,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        ),
        512,
    ),
    "a window of attention is no limit": (Gemma3TextConfig(max_position_embeddings=256, sliding_window=16), 256),
    "positions behind the padding's": (RobertaConfig(max_position_embeddings=34, pad_token_id=1), 32),
    "none: Mamba": (MambaConfig(), None),
    "none: ALiBi": (BloomConfig(), None),
    "none: -1": (XLNetConfig(), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_context_is_found_by_every_name_for_it(kind, tmp_path):
    made, context = CONTEXTS[kind]
    made.save_pretrained(tmp_path)
    assert context_of(AutoConfig.from_pretrained(tmp_path)) == context


def folder_of(made: Any, folder: Path) -> Path:
    """Write a model's folder without weights: windows are chosen before weights are read."""
    saved(llama(), folder)
    made.save_pretrained(folder)
    return folder


def test_windows_of_a_nested_config_are_no_longer_than_its_context(tmp_path):
    text = {"max_position_embeddings": 128, "vocab_size": VOCABULARY}
    folder = folder_of(Gemma3Config(text_config=text), tmp_path / "model")
    assert checked(config(folder)).window == 128
    with pytest.raises(ValueError, match="window=129 is longer than the model's context of 128 tokens"):
        checked(config(folder, "window=129"))


def test_a_model_that_names_no_context_asks_for_the_window(tmp_path):
    folder = folder_of(MambaConfig(vocab_size=VOCABULARY), tmp_path / "model")
    with pytest.raises(ValueError, match=r"a mamba, names no longest input in its config.json: give .* window=2048"):
        checked(config(folder))
    assert checked(config(folder, "window=4096")).window == 4096


def named(made: Any, architecture: str) -> Any:
    made.architectures = [architecture]
    return made


REFUSED = [
    (named(BertConfig(), "BertForMaskedLM"), "is a BertForMaskedLM by its config.json, which does not continue text"),
    (named(BertConfig(), "BertLMHeadModel"), "is a bert whose config.json does not say is_decoder"),
    (BertConfig(), "is a bert whose config.json does not say is_decoder"),
    (named(LlamaConfig(), "LlamaForSequenceClassification"), "is a LlamaForSequenceClassification by its config.json"),
    (named(LlamaConfig(), "LlamaForRewardModel"), "such as a LlamaForCausalLM"),
    (named(LlamaConfig(), "LlamaForTokenClassification"), "which does not continue text"),
    (T5Config(), "is a t5, no causal language model, for it has an encoder"),
    (named(BartConfig(), "BartForConditionalGeneration"), "is a bart, no causal language model, for it has an encoder"),
]


@pytest.mark.parametrize(("made", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_what_does_not_continue_text_is_refused_by_its_config(made, message):
    with pytest.raises(ValueError, match=message) as refusal:
        check_architecture("it", made)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "made",
    [
        named(LlamaConfig(), "LlamaForCausalLM"), named(LlamaConfig(), "FSDPLlamaForCausalLM"), LlamaConfig(),
        named(GPT2Config(), "GPT2LMHeadModel"), named(GPT2Config(), "GPT2Model"),
        named(Gemma3Config(), "Gemma3ForConditionalGeneration"),
        named(BertConfig(is_decoder=True), "BertLMHeadModel"),
    ],
    ids=lambda made: str(made.architectures),
)  # fmt: skip
def test_what_continues_text_is_accepted(made):
    check_architecture("it", made)


def test_a_masked_language_model_gets_no_perplexity(tmp_path, capsys):
    set_seed(0)
    folder = saved(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "model")
    assert "is a BertForMaskedLM by its config.json, which does not continue text" in refused(folder, capsys)


def test_one_that_reads_ahead_whatever_its_config_says_gets_no_perplexity(tmp_path, capsys):
    folder = saved(two_sided_gemma(), tmp_path / "model")
    error = refused(folder, capsys)
    assert "reads ahead: a change of the last of" in error
    assert "changes earlier logits by" in error


def test_a_bert_made_a_decoder_gets_its_perplexity(tmp_path):
    set_seed(0)
    folder = saved(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), tmp_path / "model")
    assert figures_of(folder)["window"] == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gpt2], ids=lambda build: build.__name__)
def test_a_last_token_changes_nothing_before_it_in_a_causal_model(build, dtype):
    model = build().to(dtype)
    assert logits_change(model, TOKENS, 1, ALONE.device) < 1e-6
    check_reads_no_ahead(model, "it", TOKENS, ALONE)
    check_reads_no_ahead(model, "it", [7, 7, 7], ALONE)


def test_a_new_model_that_reads_ahead_a_little_is_found_in_float32():
    set_seed(0)
    model = BertLMHeadModel(BertConfig(**{**BERT, "initializer_range": 0.02})).eval()
    assert 1e-4 < logits_change(model, TOKENS, 1, ALONE.device) < 1e-2
    with pytest.raises(ValueError, match="model=it reads ahead"):
        check_reads_no_ahead(model, "it", TOKENS, ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_token_changes_what_is_before_it_in_models_that_read_ahead(dtype):
    set_seed(0)
    shape = {"vocab_size": VOCABULARY, "d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 32}
    xlnet = XLNetLMHeadModel(XLNetConfig(**shape, initializer_range=0.3)).eval()
    for model in (two_sided_gemma(), BertLMHeadModel(BertConfig(**BERT)).eval(), xlnet):
        with pytest.raises(ValueError, match="model=it reads ahead"):
            check_reads_no_ahead(model.to(dtype), "it", TOKENS, ALONE)


def ending_of(folder: str) -> int | str | None:
    """Return how an evaluation in shards ends on this rank: with an exit code or an error."""
    import eval.model.load as load

    load.wants_fsdp = lambda: True
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    try:
        evaluate(config(Path(folder)), world)
    except SystemExit as ended:
        return ended.code
    return None


def test_two_ranks_refuse_a_model_that_reads_ahead_together(tmp_path):
    folder = saved(two_sided_gemma(), tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["use_bidirectional_attention"]
    assert run_ranks(ending_of, 2, str(folder)) == [2, 2]
