"""A folder whose model or tokenizer does not fit the configured model is refused by name before the run starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from conf.compose import composed
from conf.schema import Config, tokenizer_of
from tests.commands import run_command
from tests.interrupted import one_error
from tests.test_run import tiny
from train.model.initial import load_initial_weights
from train.model.initial_check import check_start, check_tokenizer
from train.model.initial_config import check_config
from train.plan.run import plan_run
from train.record.directory import RunDirectory, run_identity

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
}  # fmt: skip
"""The model of `tests.test_run.tiny`."""


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(("<s>", *words))}
    model = models.BPE(vocab=vocabulary, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="<s>")


def folder_of(path: Path, **changes: Any) -> Path:
    """Write a folder with the tiny model, apart from `changes` of its config, and a tokenizer."""
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).save_pretrained(path)
    tokenizer("a", "b").save_pretrained(path)
    return path


def edit(folder: Path, **fields: Any) -> None:
    """Write fields into config.json, without a change of the weights."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def start(folder: Path, init_from: Path, *overrides: str) -> None:
    """Check a run that starts from `init_from` as `python -m launch` does."""
    arguments = tiny(folder, f"init_from={init_from}", *overrides)
    config = composed("train", arguments)
    check_start(config, plan_run(config, 2), arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
         r"rope_theta is 500000.0 in the folder and 10000.0 in the config: set model.rope_theta=500000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         r"rope_type is linear in the folder and default in the config; .*factor is 2.0 in the folder .*: give a folder with"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4},
         r"set model.num_attention_heads=4 model.num_key_value_heads=4\.$"),
        ({"num_key_value_heads": 1},
         r"num_key_value_heads is 1 in the folder and 2 in the config: set model.num_key_value_heads=1"),
        ({"head_dim": 8}, r"head_dim is 8 in the folder and 16 in the config: give a folder with head_dim=16"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers is 4 in the folder and 2 in the config: set model.num_hidden_layers=4"),
        ({"hidden_act": "gelu"}, r"hidden_act is gelu in the folder and silu in the config"),
        ({"rms_norm_eps": 1e-6}, r"rms_norm_eps is 1e-06 in the folder and 1e-05 in the config: set model.rms_norm_eps=1e-06"),
        ({"attention_bias": True}, r"attention_bias is true in the folder and false in the config"),
        ({"mlp_bias": True}, r"mlp_bias is true in the folder and false in the config"),
        ({"tie_word_embeddings": True}, r"set model.tie_word_embeddings=true"),
        ({"vocab_size": 400}, r"vocab_size is 400 in the folder and 300 in the config: set model.vocab_size=400"),
        ({"intermediate_size": 96}, r"set model.intermediate_size=96"),
        ({"max_position_embeddings": 16},
         r"max_position_embeddings is 16 in the folder and 32 in the config: set model.max_pos"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_config_of_another_function_is_refused_by_field_values_and_remedy(tmp_path, changes, words):
    folder = folder_of(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=words):
        start(tmp_path, folder)
    with pytest.raises(ValueError, match=words):
        load_initial_weights(LlamaForCausalLM(LlamaConfig(**SIZES)), str(folder))


def test_the_named_override_is_all_it_takes(tmp_path):
    start(tmp_path, folder_of(tmp_path / "model", rms_norm_eps=1e-6), "model.rms_norm_eps=1e-06")
    tied = folder_of(tmp_path / "tied", tie_word_embeddings=True)
    start(tmp_path, tied, "model.tie_word_embeddings=true")


@pytest.mark.parametrize(
    "fields",
    [
        {"torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "4.0.0", "pad_token_id": 7},
        {"eos_token_id": [1, 2], "initializer_range": 0.5, "architectures": ["LlamaForCausalLM"], "pretraining_tp": 2},
        {"max_position_embeddings": 64, "attention_dropout": 0.1, "_name_or_path": "elsewhere", "unknown": 3},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None, "head_dim": None},
    ],
)
def test_fields_that_leave_the_function_alone_may_differ(tmp_path, fields):
    folder = folder_of(tmp_path / "model")
    edit(folder, **fields)
    check_config(str(folder), LlamaConfig(**SIZES))


def test_an_older_spelling_of_another_rope_is_found(tmp_path):
    folder = folder_of(tmp_path / "model")
    edit(folder, rope_parameters=None, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0})
    with pytest.raises(ValueError, match="rope_type is linear in the folder and default in the config"):
        check_config(str(folder), LlamaConfig(**SIZES))


def test_another_architecture_and_forms_that_are_no_plain_model_are_refused(tmp_path):
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match="model_type=qwen2 instead of llama"):
        start(tmp_path, tmp_path / "qwen")
    for key, value in (("quantization_config", {"quant_method": "fp8"}), ("auto_map", {"AutoModel": "x.Y"})):
        folder = folder_of(tmp_path / key)
        edit(folder, **{key: value})
        with pytest.raises(ValueError, match=f"has {key} in config.json"):
            start(tmp_path, folder)
    (adapted := folder_of(tmp_path / "adapted")).joinpath("adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        start(tmp_path, adapted)
    (bare := folder_of(tmp_path / "bare")).joinpath("config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        start(tmp_path, bare)
    (garbled := folder_of(tmp_path / "garbled")).joinpath("config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json is garbled"):
        start(tmp_path, garbled)


def with_weights(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_weights_left_over_or_missing_are_named(tmp_path):
    bias = "model.layers.0.self_attn.q_proj.bias"
    more = with_weights(folder_of(tmp_path / "more"), lambda found: found.update({bias: torch.zeros(32)}))
    with pytest.raises(ValueError, match=f"a weight {bias} that the configured model does not have"):
        start(tmp_path, more)
    less = with_weights(folder_of(tmp_path / "less"), lambda found: found.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"has no weight model\.norm\.weight"):
        start(tmp_path, less)


def test_what_older_versions_stored_twice_is_no_left_over(tmp_path):
    old = folder_of(tmp_path / "old", tie_word_embeddings=True)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_weights(old, lambda found: found.update({name: torch.zeros(8)}))
    with_weights(old, lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))
    start(tmp_path, old, "model.tie_word_embeddings=true")
    with_weights(old, lambda found: found.update({"lm_head.weight": found["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"a weight lm_head\.weight"):
        start(tmp_path, old, "model.tie_word_embeddings=true")


def test_a_weight_that_an_index_forgot_is_a_left_over(tmp_path):
    folder = folder_of(tmp_path / "model")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    start(tmp_path, folder)
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({**load_file(file), "stray": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a weight stray that"):
        start(tmp_path, folder)


def test_launch_and_plan_refuse_before_anything_is_started(tmp_path):
    folder = folder_of(tmp_path / "model", num_hidden_layers=4)
    command = tiny(tmp_path, f"init_from={folder}")
    assert "num_hidden_layers is 4 in the folder and 2 in the config" in one_error([*command, "dry_run=true"])
    assert "num_hidden_layers is 4 in the folder and 2 in the config" in one_error(
        ["-m", *command[:-1], f"init_from={folder}"]
    )
    done = run_command(["launch.plan", "model=llama_micro", f"init_from={folder}"])
    assert done.returncode == 2
    assert "vocab_size is 300 in the folder and 2048 in the config" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_that_has_begun_does_not_need_its_folder_again(tmp_path):
    folder = folder_of(tmp_path / "model")
    config = composed("train", tiny(tmp_path, f"init_from={folder}"))
    RunDirectory(tmp_path / "runs" / "tiny").path.mkdir(parents=True)
    RunDirectory(tmp_path / "runs" / "tiny").begin(config)
    shutil.rmtree(folder)
    start(tmp_path, folder)
    with pytest.raises(ValueError, match="does not exist"):
        start(tmp_path, folder, "overwrite=true")


# --- the tokenizer ---


def config_of(*overrides: str) -> Config:
    config = composed("train", ["data=pydocs", *overrides])
    assert isinstance(config, Config)
    return config


def test_a_tokenizer_larger_than_the_model_is_refused_before_anything_is_started(tmp_path):
    tokenizer(*(f"word {index}" for index in range(300))).save_pretrained(tmp_path / "tokenizer")
    arguments = tiny(tmp_path, f"tokenizer={tmp_path}/tokenizer")
    config = composed("train", arguments)
    with pytest.raises(ValueError, match=r"tokenizer has 301 tokens, more than model\.vocab_size=300"):
        check_start(config, plan_run(config, 2), arguments)


def test_the_tokenizer_is_the_folders_unless_another_is_named():
    assert tokenizer_of(config_of()) == "train"
    assert tokenizer_of(config_of("init_from=runs/a/model")) == "runs/a/model"
    assert tokenizer_of(config_of("init_from=runs/a/model", "tokenizer=train")) == "train"


def test_a_run_begun_with_the_written_out_default_is_the_same_run():
    before = run_identity(config_of("tokenizer=train"))
    assert run_identity(config_of()) == before
    assert run_identity(config_of("init_from=a")) == run_identity(config_of("init_from=a", "tokenizer=a"))
    assert run_identity(config_of("init_from=a")) != run_identity(config_of("init_from=a", "tokenizer=train"))


def test_a_tokenizer_that_nobody_named_is_refused_and_a_named_one_is_warned_of(tmp_path, capsys):
    folder = folder_of(tmp_path / "model")
    tokenizer("b", "a").save_pretrained(tmp_path / "other")
    for spec in ("train", f"{tmp_path}/other"):
        # The tokenizer is set as an experiment's yaml would set it.
        config = config_of(f"init_from={folder}", f"tokenizer={spec}")
        with pytest.raises(ValueError, match=r"set tokenizer=null to use the folder's"):
            check_tokenizer(config, ["experiment=mine"])
        check_tokenizer(config, ["experiment=mine", f"tokenizer={spec}"])
        assert f"warning: tokenizer={spec} is" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "same")
    check_tokenizer(config_of(f"init_from={folder}", f"tokenizer={tmp_path}/same"), [])
    check_tokenizer(config_of(f"init_from={folder}"), [])
    assert capsys.readouterr().err == ""


def test_a_folder_without_a_tokenizer_asks_for_one_by_name(tmp_path):
    folder = folder_of(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer.* give that one, tokenizer="):
        start(tmp_path, folder)
    start(tmp_path, folder, "tokenizer=train")
