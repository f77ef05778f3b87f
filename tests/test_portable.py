"""An exported folder is the same model to transformers 4 and to 5."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from conf.schema import ModelConfig
from sparsity.compact import compact_folder, expand_folder
from tests.test_export import tokenizer_in
from train.distributed import World
from train.model.build import build_model
from train.model.export import export_model
from train.model.portable import portable_config, portable_tokenizer_config

THETA = 500.0
"""A value that is neither version's default, so that a model read without it has other logits."""
IDS = torch.arange(48).view(2, 24) % 61
TEXTS = ["a few words  to train", " on <s>", "é 你"]
NEEDED = ["transformers<5", "tokenizers>=0.22,<=0.23.0", "huggingface-hub<1.0"]
SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

folder, texts, ids = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor(ids)).logits
print(json.dumps({
    "version": __version__, "dtype": str(model.dtype), "logits": logits.double().tolist(),
    "ids": [tokenizer(text)["input_ids"] for text in texts], "special": sorted(tokenizer.all_special_tokens),
}))
"""


def sentencepiece_like() -> Any:
    """Return a tokenizer of a class that adds a bos in transformers 4 but not in 5."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6}
    return LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")])


def with_more_tokens(folder: Path) -> Any:
    tokenizer = tokenizer_in(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<a>", "<b>"]})
    return tokenizer


TOKENIZERS = {"bpe": tokenizer_in, "more": with_more_tokens, "llama": lambda folder: sentencepiece_like()}


@pytest.fixture(scope="module", params=[("float32", "bpe"), ("bfloat16", "more"), ("float32", "llama")], ids=str)
def exported(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("portable")
    dtype, kind = request.param
    tokenizer = TOKENIZERS[kind](folder / "tokenizer")
    config = ModelConfig(
        name="tiny", vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, rope_theta=THETA,
    )  # fmt: skip
    model = build_model(config, tokenizer, seed=0)
    with torch.no_grad():
        # Weights are larger than in a new model, so that attention, and with it the positions, matter.
        for weight in model.parameters():
            weight.mul_(5)
            weight.view(-1)[::2] = 0
    world = World(0, 1, torch.device("cpu"))
    export_model(model, tokenizer, folder / "model", dtype=dtype, max_shard_size="5GB", world=world)
    compact_folder(folder / "model", folder / "compact")
    expand_folder(folder / "compact", folder / "expanded")
    return folder


def table(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["model", "compact", "expanded"])
def test_the_files_hold_the_names_of_both_versions(exported, name):
    config = table(exported / name / "config.json")
    assert (config["rope_theta"], config["rope_scaling"]) == (THETA, None)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    assert config["torch_dtype"] == config["dtype"]
    tokenizer = table(exported / name / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)


def test_the_weights_say_that_they_are_pytorchs(exported):
    """transformers 4 refuses a file that does not say so."""
    with safe_open(exported / "model" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_this_version_reads_the_same_from_both_names(exported):
    config = AutoConfig.from_pretrained(exported / "model")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}
    assert f"torch.{table(exported / 'model' / 'config.json')['dtype']}" == str(config.dtype)


def test_a_scaled_rope_is_written_as_transformers_4_reads_it():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    config = portable_config({"rope_parameters": rope})
    assert config == {
        "rope_parameters": rope, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }  # fmt: skip
    layered = {"rope_parameters": {"full_attention": rope}, "dtype": "float16"}
    assert portable_config(layered) == {**layered, "torch_dtype": "float16"}


def test_more_special_tokens_have_the_older_name():
    config = portable_tokenizer_config({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> Path:
    """Install transformers 4 in a folder that can be put before this environment's packages."""
    folder = tmp_path_factory.mktemp("transformers-4")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *NEEDED]
    done = subprocess.run(install, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(f"pip could not install transformers 4 ({done.stderr.strip().splitlines()[-1:]})")
    return folder


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["model", "expanded"])
def test_transformers_4_gives_the_same_logits_and_ids(exported, name, transformers_4):
    folder = exported / name
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(TEXTS), json.dumps(IDS.tolist())],
        cwd=exported, env={**os.environ, "PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found["special"] == sorted(tokenizer.all_special_tokens)
    # transformers 4 reads float32 unless it is asked for the file's dtype.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, found["dtype"].removeprefix("torch.")))
    with torch.no_grad():
        logits = model(IDS).logits.double()
    assert torch.allclose(torch.tensor(found["logits"], dtype=torch.float64), logits, rtol=0, atol=1e-5)
    model.config.rope_parameters["rope_theta"] = 10000.0
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (other(IDS).logits.double() - logits).abs().max() > 1e-3
