"""transformers loads a compact folder as it would the plain one, and refuses a damaged or foreign one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

from sparsity.compact import METHOD, compact_folder, expand_folder
from sparsity.compact.contents import read_contents
from sparsity.compact.loading import expansions
from tests.compact_models import IDS, check_equal, same_bits, sparse_model, write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("compact"))


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.float32),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": "auto", "dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"device_map": "cpu", "dtype": "auto"}, torch.float32),
    ],
    ids=str,
)
def test_transformers_loads_the_folder_as_it_would_the_plain_one(folders, arguments, dtype):
    model = AutoModelForCausalLM.from_pretrained(folders["compact"], **arguments)
    check_equal(model, sparse_model(), dtype)
    assert all(type(param) is torch.nn.Parameter and param.requires_grad for param in model.parameters())


def test_some_layers_may_be_left_on_the_disk(folders, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folders["compact"], device_map=places, offload_folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, sparse_model()(IDS).logits)


def test_the_base_model_loads_in_the_type_that_is_asked_for(folders):
    model = AutoModel.from_pretrained(folders["compact"], dtype=torch.bfloat16)
    check_equal(model, sparse_model().model, torch.bfloat16)


def test_a_tied_model_in_one_file_loads(tmp_path):
    sparse_model(tied=True).save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    check_equal(model, sparse_model(tied=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_loaded_model_is_plain_and_saves_a_plain_folder(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["compact"])
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    saved, expected = load_file(tmp_path / "saved" / "model.safetensors"), sparse_model().state_dict()
    assert saved.keys() == expected.keys()
    assert all(same_bits(saved[name], expected[name]) for name in expected)


def test_without_the_format_registered_a_load_fails_instead_of_giving_random_weights(folders, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folders["compact"])


def test_a_damaged_file_is_refused_by_name_before_it_is_loaded(folders, tmp_path):
    shutil.copytree(folders["compact"], tmp_path / "compact")
    path = sorted((tmp_path / "compact").glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    name = max(read_contents(path)[1], key=lambda tensor: tensor.values.start).name
    with pytest.raises(ValueError, match=f"{path.name}: {re.escape(name)} is damaged .*checksum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact")


def test_a_config_of_another_model_or_a_newer_version_is_refused(folders, tmp_path):
    shutil.copytree(folders["compact"], tmp_path / "compact")
    place = tmp_path / "compact" / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"\(56, 32\) in the file and \(64, 32\) in the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    place.write_text(json.dumps({**config, "quantization_config": {"quant_method": METHOD, "version": 3}}))
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: expand_folder(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="version 3 of the compact format where this reads 1 and 2"):
            load(tmp_path / "compact")


def test_a_model_that_merges_a_sparse_tensor_while_loading_is_refused():
    from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

    merge = WeightConverter("experts.*.up.weight", "experts.up", [MergeModulelist()])
    renaming = WeightRenaming("^old", "new")
    assert expansions([], [merge]) == []
    [conversion] = expansions(["old.weight"], [renaming, merge])
    assert conversion.rename_source_key("new.weight") == ("new.weight", conversion.source_patterns[-1])
    assert conversion.rename_source_key("new.weight.bitmask") == ("new.weight", conversion.source_patterns[0])
    assert conversion.rename_source_key("newxweight") == ("newxweight", None)
    with pytest.raises(ValueError, match="merged or split while it is loaded"):
        expansions(["experts.0.up.weight"], [merge])
