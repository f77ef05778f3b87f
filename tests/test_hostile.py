"""Folders from untrusted sources: nothing in them is executed, no path leads out of them, and garbled files are named."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conf.compose import composed
from conf.schema import Config
from eval.model.load import load_whole, model_config
from sparsity.common.files import sha256_of
from tests.test_run import tiny
from train.checkpoints import layout
from train.checkpoints.read import CheckpointReader
from train.data.documents import read_documents
from train.data.tokenizer import load_tokenizer, train_bpe, wrap_bpe
from train.model.initial import load_initial_weights
from train.record.directory import RunDirectory
from train.record.metrics import keep_whole_records


class Bomb:
    """An object that creates the file `fuse` when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.fuse),)


@pytest.fixture
def fuse(tmp_path) -> Path:
    """Return the path of a file that must not exist after a test."""
    return tmp_path / "executed"


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def config_of(folder: Path, *overrides: str) -> Config:
    config = composed("train", tiny(folder, *overrides))
    assert isinstance(config, Config)
    return config


CODE = "import os\nos.mkdir({fuse!r})\nfrom transformers import {base} as Made\n"


def with_code(folder: Path, fuse: Path, file: str, key: str, base: str) -> None:
    """Give a model or tokenizer folder its own code, and a config that asks for it."""
    (folder / "made.py").write_text(CODE.format(fuse=str(fuse), base=base))
    config = json.loads((folder / file).read_text())
    own = "made.Made" if key != "AutoTokenizer" else ["made.Made", "made.Made"]
    config |= {"auto_map": {key: own, "AutoConfig": "made.Made"}}
    if key == "AutoTokenizer":
        config |= {"tokenizer_class": "Made"}
    else:
        config |= {"model_type": "made", "architectures": ["Made"]}
    (folder / file).write_text(json.dumps(config))


def test_a_model_that_brings_its_own_code_is_refused_by_eval(tmp_path, fuse):
    model().save_pretrained(tmp_path / "model")
    with_code(tmp_path / "model", fuse, "config.json", "AutoModelForCausalLM", "LlamaForCausalLM")
    for load in (model_config, lambda folder: load_whole(folder, torch.float32)):
        with pytest.raises(ValueError, match="contains custom code"):
            load(str(tmp_path / "model"))
    assert not fuse.exists()


def test_pickled_weights_are_refused_by_eval_and_init_from(tmp_path, fuse):
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_whole(str(folder), torch.float32)
    with pytest.raises(ValueError, match="a pickle alone"):
        load_initial_weights(model(), str(folder))
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_initial_weights(model(), str(folder))
    assert not fuse.exists()


def test_a_tokenizer_that_brings_its_own_code_is_not_executed(tmp_path, fuse):
    train_bpe(["some words to train on " * 20], 270, tmp_path / "tokenizer.json")
    folder = tmp_path / "tokenizer"
    wrap_bpe(tmp_path / "tokenizer.json", 32).save_pretrained(folder)
    with_code(folder, fuse, "tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(str(folder))
    assert not fuse.exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", "code.bin", "a/b.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    model().config.save_pretrained(tmp_path / "model")
    model().save_pretrained(tmp_path / "other")
    weight_map = dict.fromkeys(model().state_dict(), name)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="which is no safetensors file of that folder"):
        load_initial_weights(model(), str(tmp_path / "model"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_garbled_index_is_said_in_a_sentence(tmp_path, text):
    model().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is garbled"):
        load_initial_weights(model(), str(tmp_path))


def test_a_pickled_array_in_the_cache_is_not_loaded(tmp_path, fuse):
    from train.data.unigram import unigram_bits_per_byte

    np.save(tmp_path / "counts.npy", np.array([Bomb(fuse)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        unigram_bits_per_byte(SimpleNamespace(folder=str(tmp_path)))
    assert not fuse.exists()


def test_a_pickle_in_a_data_folder_is_no_document(tmp_path, fuse):
    from train.data.corpus import find_corpus

    (tmp_path / "data.pkl").write_bytes(pickle.dumps(Bomb(fuse)))
    (tmp_path / "loader.py").write_text(CODE.format(fuse=str(fuse), base="Trainer"))
    with pytest.raises(ValueError, match="holds no data"):
        find_corpus(config_of(tmp_path, f"data.path={tmp_path}").data, tmp_path / "cache")
    (tmp_path / "text.jsonl").write_bytes(pickle.dumps(Bomb(fuse)))
    corpus = find_corpus(config_of(tmp_path, f"data.path={tmp_path}").data, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"text\.jsonl, line 1"):
        [text for part in corpus.parts() for text in read_documents(part, "text")]
    assert not fuse.exists()


def unfinished_run(folder: Path) -> tuple[RunDirectory, Config]:
    """Make the folder of a run that has begun."""
    directory, config = RunDirectory(folder / "runs" / "tiny"), config_of(folder)
    directory.claim(config, 0)
    directory.begin(config)
    directory._lock.release()
    return directory, config


GARBLED = {
    "an object": "!!python/object/apply:os.mkdir ['{fuse}']",
    "an object as a value": "run_name: !!python/object/apply:os.mkdir ['{fuse}']",
    "a word": "words",
    "a list": "[1, 2]",
    "nothing": "",
    "no yaml": "{{",
}


@pytest.mark.parametrize("kind", GARBLED)
def test_a_garbled_or_hostile_config_in_a_run_is_said_and_not_executed(tmp_path, fuse, kind):
    directory, config = unfinished_run(tmp_path)
    directory.config.write_text(GARBLED[kind].format(fuse=fuse))
    with pytest.raises(ValueError, match=r"config\.yaml is garbled or was not written by a run"):
        directory.claim(config, 0)
    assert not fuse.exists()


def test_an_interpolation_in_a_runs_config_is_compared_and_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    directory, config = unfinished_run(tmp_path)
    directory.config.write_text(directory.config.read_text().replace("tokenizer: train", "tokenizer: ${oc.env:SECRET}"))
    with pytest.raises(ValueError, match="in use by a run with another config") as refusal:
        directory.claim(config, 0)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "3", "half a"])
def test_a_garbled_summary_is_named(tmp_path, text):
    directory, config = unfinished_run(tmp_path)
    directory.summary.write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json is garbled"):
        directory.claim(config, 0)


@pytest.mark.parametrize("line", ["\x00\x00\x00", "3", "[1]", '{"loss": 1}'])
def test_a_garbled_record_is_named_and_a_cut_off_last_one_removed(tmp_path, line):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"train/global_step": 1}\n{"train/glo')
    assert keep_whole_records(metrics) == [{"train/global_step": 1}]
    assert metrics.read_text() == '{"train/global_step": 1}\n'
    metrics.write_text(f'{line}\n{{"train/global_step": 1}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds a line that is not a record"):
        keep_whole_records(metrics)


def test_a_pickle_in_the_place_of_a_checkpoints_tensors_is_not_loaded(tmp_path, fuse):
    """Its checksums agree, because whoever writes the file can write them too."""
    folder = layout.folder_of(tmp_path, 5)
    folder.mkdir()
    (folder / layout.rank_file(0)).write_bytes(pickle.dumps(Bomb(fuse)))
    state = {"format": layout.FORMAT, "step": 5, "pieces": {"writers": [0], "rows": {"w": 7}}}
    (folder / layout.STATE).write_text(json.dumps(state))
    (folder / layout.TRAINER_STATE).write_text("{}")
    names = (layout.STATE, layout.TRAINER_STATE, layout.rank_file(0))
    (folder / layout.SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in names))
    assert layout.damage(folder) is None
    with pytest.raises(Exception, match=r"[Hh]eader"):
        CheckpointReader(folder).rows("model", "w", 0, 7)
    assert not fuse.exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "..", ".", "", "a//b", "a/"])
@pytest.mark.parametrize("key", ["run_name", "sweep_name", "model.name"])
def test_no_name_leads_out_of_the_runs_folder(tmp_path, key, name):
    with pytest.raises(ValueError, match="leaves the runs folder"):
        config_of(tmp_path, f"{key}='{name}'")


def test_torch_loads_nothing_here():
    """No module unpickles a file; `all_gather_object` is used only between the processes of a run."""
    sources = [path for room in ("conf", "eval", "launch", "sparsity", "train") for path in Path(room).rglob("*.py")]
    assert len(sources) > 80
    for path in sources:
        text = path.read_text()
        for call in (
            "torch.load(",
            "pickle.load",
            "allow_pickle=True",
            "trust_remote_code=True",
            "joblib.load(",
            "yaml.load(",
        ):
            assert call not in text, (path, call)
