"""`python -m eval` on model folders: its four figures against plain loops, any architecture, zero counts, bad input."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.compose import composed
from eval.model.perplexity import evaluate, tokenized
from eval.model.text import block_of, figures_text
from eval.model.wikitext import read_wikitext
from sparsity.compact import compact_folder
from tests.commands import run_command
from tests.small_models import CONTEXT, VOCABULARY, gpt2, llama, prune, saved
from tests.test_bad_input import the_error
from train.data import load_tokenizer
from train.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def config(folder: Path, *overrides: str) -> Any:
    return composed(
        "eval", [f"folder='{folder}'", "data=wikitext", f"data.path='{folder.parent / 'text.raw'}'", *overrides]
    )


def figures_of(folder: Path, *overrides: str) -> dict[str, Any]:
    return evaluate(config(folder, *overrides), ALONE)


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    with pytest.raises(SystemExit) as ended:
        figures_of(folder, *overrides)
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


@torch.no_grad()
def nats(model: Any, context: np.ndarray, token: int) -> float:
    return -float(model(torch.from_numpy(context)[None]).logits[0, -1].double().log_softmax(-1)[token])


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> tuple[Path, Any, int]:
    model = llama()
    zeros = prune(model, 0.25)
    return saved(model, tmp_path_factory.mktemp("sparse") / "model"), model, zeros


def test_the_four_figures_equal_loops_over_the_tokens(sparse):
    folder, model, _ = sparse
    figures = figures_of(folder)
    tokens = tokenized(read_wikitext(config(folder).data), load_tokenizer(str(folder)), "")
    text, window = tokens.tokens, 32
    num_windows = len(text) // window
    alone = [
        nats(model, text[start : start + at], text[start + at])
        for start in range(0, num_windows * window, window)
        for at in range(1, window)
    ]
    assert figures["token_perplexity"] == pytest.approx(math.exp(math.fsum(alone) / len(alone)), rel=1e-5)
    every = [nats(model, text[(at - 1) // window * window : at], text[at]) for at in range(1, len(text))]
    assert figures["bits_per_byte"] == pytest.approx(math.fsum(every) / math.log(2) / figures["num_bytes"], rel=1e-5)
    # A window of 32 moves by 8 tokens: its last 8 tokens are read after at least 24 others.
    starts = [0 if at < 32 else min(at - 24 - (at - 32) % 8, len(text) - 1) for at in range(1, len(text))]
    strided = [nats(model, text[start:at], text[at]) for at, start in zip(range(1, len(text)), starts, strict=True)]
    assert figures["token_perplexity_stride512"] == pytest.approx(math.exp(math.fsum(strided) / len(strided)), rel=1e-5)
    paged, begin = [], 0
    for length in tokens.page_lengths:
        page = tokens.page_tokens[begin : begin + length]
        begin += length
        for first in range(1, length, window):
            stop = min(first + window, length)
            start = max(0, stop - 1 - window) if first > 1 else 0
            paged += [nats(model, page[start:at], page[at]) for at in range(first, stop)]
    words = figures["num_page_words"]
    assert figures["word_perplexity"] == pytest.approx(math.exp(math.fsum(paged) / words), rel=1e-5)
    assert (figures["window"], figures["stride"], figures["num_windows"]) == (32, 8, num_windows)
    assert figures["num_tokens"] == len(text)


def test_the_command_prints_one_object(sparse):
    folder, _, zeros = sparse
    done = run_command(
        ["eval", f"model={folder}", "data=wikitext", f"data.path={folder.parent}/text.raw", "format=json"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["zero_linear_params"] == zeros
    assert figures == json.loads(json.dumps({**figures_of(folder), "model": str(folder)}))


def test_a_compact_folder_has_the_figures_of_the_plain_one(sparse):
    folder, _, zeros = sparse
    compact_folder(folder, folder.parent / "compact")
    figures = figures_of(folder.parent / "compact")
    assert figures == {**figures_of(folder), "model": figures["model"]}
    assert figures["zero_linear_params"] == zeros


def test_zeros_are_counted_per_layer_and_in_total(sparse):
    folder, _, zeros = sparse
    figures = figures_of(folder)
    assert (figures["zero_linear_params"], figures["dense"]) == (zeros, False)
    assert sum(figures["layer_zeros"].values()) == zeros
    assert figures["layer_zeros"]["model.layers.1.mlp.up_proj.weight"] == 10 * 24
    assert figures["layer_weights"]["lm_head.weight"] == VOCABULARY * 24
    text = figures_text(figures)
    assert f"{zeros:,} of {figures['linear_params']:,} linear weights are zero (25.00%)" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["model.layers.0", "model.layers.1", "lm_head"]


@pytest.mark.parametrize(
    ("name", "block"),
    [("model.layers.3.mlp.up_proj.weight", "model.layers.3"), ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
     ("lm_head.weight", "lm_head")],
)  # fmt: skip
def test_a_weight_is_counted_in_its_numbered_layer(name, block):
    assert block_of(name) == block


def test_a_dense_model_is_called_dense(tmp_path):
    figures = figures_of(saved(llama(), tmp_path / "model"))
    assert figures["dense"]
    assert "dense: 0 of" in figures_text(figures)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_with_its_conv1d_and_tied_head_is_evaluated(tied, tmp_path):
    model = gpt2(tie_word_embeddings=tied)
    prune(model, 0.25)
    figures = figures_of(saved(model, tmp_path / "model", max_shard_size="20KB"))
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert figures["sparsity"] == 0.25
    assert ("lm_head.weight" in figures["layer_zeros"]) is not tied
    assert "transformer.h.1.attn.c_attn.weight" in figures["layer_zeros"]
    assert figures["window"] == CONTEXT


def test_a_config_as_older_transformers_wrote_it_is_read(sparse, tmp_path):
    """The published models of the series were saved by older versions of transformers."""
    folder = saved(llama(), tmp_path / "model")
    old = {
        "_name_or_path": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40,
        "max_position_embeddings": 32, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.40.0",
        "use_cache": True, "vocab_size": VOCABULARY, "sparsity_config": {"sparsity": 0.8},
    }  # fmt: skip
    now = figures_of(folder)
    now_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, "rms_norm_eps": now_json["rms_norm_eps"]}))
    assert figures_of(folder)["bits_per_byte"] == now["bits_per_byte"]


def test_a_bfloat16_model_computes_in_its_own_dtype_or_in_another(tmp_path):
    folder = saved(llama().bfloat16(), tmp_path / "model")
    own, exact = figures_of(folder), figures_of(folder, "dtype=float32")
    assert (own["dtype"], exact["dtype"]) == ("bfloat16", "float32")
    assert own["token_perplexity"] != exact["token_perplexity"]
    assert own["token_perplexity"] == pytest.approx(exact["token_perplexity"], rel=0.05)


def test_figures_do_not_depend_on_the_batch(sparse):
    one, many = figures_of(sparse[0], "batch_size=1"), figures_of(sparse[0], "batch_size=7")
    for name in ("token_perplexity", "token_perplexity_stride512", "word_perplexity", "bits_per_byte"):
        assert one[name] == pytest.approx(many[name], rel=1e-6)


def test_a_shorter_window_changes_the_stride_and_not_the_keys(sparse):
    figures = figures_of(sparse[0], "window=16")
    assert (figures["window"], figures["stride"]) == (16, 4)
    assert figures["num_windows"] == figures["num_tokens"] // 16
    assert figures["token_perplexity_stride512"] > 0


def test_a_pickle_is_read_as_tensors_alone(tmp_path):
    folder = saved(llama(), tmp_path / "model")
    safe = figures_of(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert figures_of(folder)["bits_per_byte"] == safe["bits_per_byte"]


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hostile-code-ran"),)


def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = saved(llama(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Hostile(), file, protocol=2)
    assert "cannot be loaded" in refused(folder, capsys)
    assert not (tmp_path / "hostile-code-ran").exists()


def test_code_in_a_folder_never_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = saved(llama(), tmp_path / "model")
    (folder / "own.py").write_text("from pathlib import Path\nPath('hostile-code-ran').touch()\nclass Own: pass\n")
    changed = json.loads((folder / "config.json").read_text())
    changed |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(changed))
    assert "cannot be loaded" in refused(folder, capsys)
    assert not (tmp_path / "hostile-code-ran").exists()


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_a_large_tokenizer(folder: Path) -> None:
    changed = json.loads((folder / "tokenizer.json").read_text())
    changed["model"]["vocab"]["zz"] = VOCABULARY + 5
    (folder / "tokenizer.json").write_text(json.dumps(changed))


def with_little_text(folder: Path) -> None:
    (folder.parent / "text.raw").write_text("few words")


DAMAGE = [
    (without_a_weight, "lacks 1 of its weights, such as model.layers.1.mlp.up_proj.weight"),
    (with_another_shape, "has lm_head.weight stored as (299, 24), but its config.json asks for (300, 24)"),
    (cut_short, "cannot be loaded"),
    (of_another_kind, "is a t5, no causal language model"),
    (not_json, "cannot be loaded"),
    (without_weights, "cannot be loaded"),
    (without_config, "holds no config.json"),
    (with_a_large_tokenizer, f"has {VOCABULARY + 6} tokens, more than the {VOCABULARY} of"),
    (with_little_text, "less than one window of 32"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_folder_is_refused_in_one_sentence(damage, message, tmp_path, capsys):
    folder = saved(llama(), tmp_path / "model")
    damage(folder)
    assert message in refused(folder, capsys)


WRONG_KEYS = [
    (["window=33"], "window=33 is longer than the model's context of 32 tokens"),
    (["stride=32"], "stride=32 must be below the window of 32"),
    (["tokenizer=nowhere.model"], "tokenizer=nowhere.model does not exist"),
    (["data.path=nowhere.raw"], "data.path=nowhere.raw is not a file"),
    (["folder=./nowhere"], "model=./nowhere is not a folder"),
]


@pytest.mark.parametrize(
    ("overrides", "message"), WRONG_KEYS, ids=lambda value: value[0] if isinstance(value, list) else None
)
def test_what_does_not_fit_is_said_before_a_weight_is_read(overrides, message, sparse, capsys, monkeypatch):
    monkeypatch.setattr("eval.model.perplexity.load_model", lambda *_: pytest.fail("weights were read"))
    assert message in refused(sparse[0], capsys, *overrides)


CONFIG_MISTAKES = [
    (["window=16", "stride=16"], "stride=16 must be below window=16"),
    (["stride=0"], "stride=0 must be at least 1"),
    (["data=pydocs", "data.path=null", "stride=4"], "stride=4 is for data=wikitext"),
    (["dtype=int8"], "dtype=int8 is not known"),
    (["batch_size=0"], "batch_size=0 must be at least 1"),
    (["device=tpu"], "device=tpu is not known"),
    (["task_path=tasks"], "name those to run in tasks"),
]


@pytest.mark.parametrize(("overrides", "message"), CONFIG_MISTAKES, ids=lambda value: value[-1])
def test_a_mistake_in_the_keys_is_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, *overrides)


def test_a_device_that_is_not_there_is_refused(sparse):
    done = run_command(["eval", f"model={sparse[0]}", "data=wikitext", "data.path=x", "device=cuda:3"])
    assert "device=cuda:3 is not there, this machine shows 0 GPUs" in the_error(done)


def test_wikitext_is_not_trained_on():
    with pytest.raises(ValueError, match="data=wikitext is a test text"):
        composed("train", ["data=wikitext"])
