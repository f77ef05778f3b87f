"""The compact checkpoint: bits, sizes, loading through transformers, folders, and damaged files."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import auto

import sparsity.compact.folder as folder_module
from conf.schema import ModelConfig
from eval.compact import main
from sparsity.common.safetensors_header import Entry, format_header, read_header
from sparsity.compact import METHOD, compact_folder, expand_folder
from sparsity.compact.bitmask import BLOCK, bitmask_bytes, compress, expand, expand_on_device
from sparsity.compact.contents import BITMASK, Stored, read_contents
from sparsity.compact.files import compact_file, expand_file
from sparsity.compact.loading import expansions
from sparsity.prunable import own_linear_weights
from tests.benchmarks.common import EXACT_MEMORY, in_process
from tests.hostile import all_tensors, join_file, split_file, write_plain
from train.model.build import llama_config

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.arange(24).view(2, 12)


def sparse_model(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in own_linear_weights(model).values():
            weight.masked_fill_(torch.rand_like(weight) < 0.8, 0)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Make a model folder with several files, and its compact form."""
    base = tmp_path_factory.mktemp("compact")
    sparse_model().save_pretrained(base / "plain", max_shard_size="20KB")
    compact_folder(base / "plain", base / "compact")
    assert len(list((base / "compact").glob("*.safetensors"))) > 2
    return {"plain": base / "plain", "compact": base / "compact"}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and bytes_of(first) == bytes_of(second)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check_equal(model: torch.nn.Module, expected: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert same_bits(found[name], tensor.to(dtype)), name


# --- bits ---


def test_a_weight_is_one_bit_of_little_endian_words_and_its_values_follow(tmp_path):
    weight = torch.zeros(8, 10, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 9], weight[7, 9] = 1.0, 2.0, 3.0
    save_file({"w": weight}, tmp_path / "plain")
    compact_file(tmp_path / "plain", tmp_path / "compact")
    found = load_file(tmp_path / "compact")
    assert found["w.bitmask"].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0]
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [1.0, 2.0, 3.0]
    header, _ = split_file(tmp_path / "compact")
    assert json.loads(header["__metadata__"][METHOD]) == json.loads(blocks_of_the_document("json")[0])


def test_the_reader_in_the_document_reads_what_is_written(tmp_path):
    write_plain(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    [reader] = [block for block in blocks_of_the_document("python") if "def read_compact" in block]
    names: dict[str, Any] = {}
    exec(reader, names)
    found = {}
    for file in (tmp_path / "compact").glob("*.safetensors"):
        found.update(names["read_compact"](file.read_bytes()))
    expected = all_tensors(tmp_path / "plain")
    assert {name: (shape, bits) for name, (_, shape, bits) in found.items()} == {
        name: (shape, bits) for name, (_, shape, bits) in expected.items()
    }


def blocks_of_the_document(language: str) -> list[str]:
    text = (ROOT / "docs" / "format.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_only_the_zero_without_a_sign_is_pruned_and_every_other_bit_pattern_survives(tmp_path, dtype):
    tiny = torch.finfo(dtype).smallest_normal * 0.25
    special = torch.tensor([0.0, -0.0, tiny, -tiny, torch.inf, -torch.inf, torch.nan], dtype=torch.float64).to(dtype)
    payload = torch.full((9,), torch.nan, dtype=dtype)
    bits = payload.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    bits += torch.arange(9, dtype=bits.dtype) * 5
    weight = torch.cat([special, payload, torch.zeros(400, dtype=dtype)])
    save_file({"w": weight}, tmp_path / "plain")
    compact_file(tmp_path / "plain", tmp_path / "compact")
    assert load_file(tmp_path / "compact")["w"].numel() == 15
    expand_file(tmp_path / "compact", tmp_path / "expanded")
    assert same_bits(load_file(tmp_path / "expanded")["w"], weight)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_any_size_comes_back_from_numpy_and_from_a_devices_operations(size):
    items = np.random.default_rng(size).integers(0, 3, size).astype(np.uint16)
    bitmask, kept = compress(items)
    assert bitmask.size == bitmask_bytes(size)
    assert np.array_equal(np.concatenate([np.empty(0, np.uint16), *expand(bitmask, kept, size)]), items)
    on_device = expand_on_device(torch.from_numpy(bitmask), torch.from_numpy(kept.view(np.int16)), size)
    assert np.array_equal(on_device.numpy().view(np.uint16), items)


@pytest.mark.parametrize(
    ("num_kept", "bit"), [(2, None), (4, None), (3, 100), (3, 127)], ids=["fewer", "more", "beyond", "last"]
)
def test_a_mask_that_keeps_another_number_or_what_is_not_there_is_refused(num_kept, bit):
    bits = np.zeros(128, bool)
    bits[[3, 50, 99 if bit is None else bit]] = True
    bitmask, kept = np.packbits(bits, bitorder="little"), np.ones(num_kept, np.int16)
    with pytest.raises(ValueError, match="keeps"):
        list(expand(bitmask, kept, 100))
    with pytest.raises(ValueError, match="keeps"):
        expand_on_device(torch.from_numpy(bitmask), torch.from_numpy(kept), 100)


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path):
    write_plain(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    expand_folder(tmp_path / "compact", tmp_path / "expanded")
    assert all_tensors(tmp_path / "expanded") == all_tensors(tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "plain").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "compact").glob("*.safetensors")) == files
    read = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("plain", "expanded")
    ]
    assert read[0]["weight_map"] == read[1]["weight_map"]
    assert read[1]["metadata"]["total_size"] == sum(len(bits) for *_, bits in all_tensors(tmp_path / "plain").values())


def test_every_stored_tensor_lies_aligned_to_its_type(tmp_path):
    shapes = {"a": torch.float32, "b": torch.float16, "c": torch.float64, "d": torch.uint8, "e": torch.bfloat16}
    tensors = {name: (torch.arange(333) % 7 == 0).to(dtype) for name, dtype in shapes.items()}
    save_file(tensors, tmp_path / "plain")
    stored = compact_file(tmp_path / "plain", tmp_path / "compact")
    assert sum(tensor.bitmask is not None for tensor in stored) >= 4
    header = read_header(tmp_path / "compact")
    for entry in header.entries.values():
        assert (header.num_bytes + entry.start) % entry.item_bytes == 0


# --- sizes ---


@pytest.mark.parametrize(("num_zeros", "is_sparse"), [(4, False), (5, True)])
def test_a_tensor_is_sparse_only_where_that_is_smaller(tmp_path, num_zeros, is_sparse):
    """For 64 bf16 weights, a mask of 8 bytes saves space from the fifth zero on."""
    weight = torch.ones(64, dtype=torch.bfloat16)
    weight[:num_zeros] = 0
    save_file({"w": weight}, tmp_path / "plain")
    [stored] = compact_file(tmp_path / "plain", tmp_path / "compact")
    assert (stored.bitmask is not None) == is_sparse
    assert stored.stored_bytes == (8 + 2 * 59 if is_sparse else 2 * 64)


def test_eighty_percent_sparse_bf16_takes_at_most_four_and_a_quarter_bits_a_weight(tmp_path):
    weight = torch.ones(500, 400, dtype=torch.bfloat16)
    weight.view(-1)[torch.randperm(200_000)[:160_000]] = 0
    save_file({"w": weight}, tmp_path / "plain")
    compact_file(tmp_path / "plain", tmp_path / "compact")
    assert 8 * (tmp_path / "compact").stat().st_size / 200_000 <= 4.25


def test_the_1b_model_takes_less_than_85_percent_of_a_gigabyte():
    config = ModelConfig(**yaml.safe_load((ROOT / "conf/model/llama2_1b.yaml").read_text()))
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(config))
    linear = own_linear_weights(model)
    assert sum(weight.numel() for weight in linear.values()) == 1_139_277_824
    stored, total, offset = [], 0, 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        # Only the number of pruned linear weights matters: their places change no size.
        kept = weight.numel() - 4 * weight.numel() // 5 if name in linear else weight.numel()
        bitmask = Entry("U8", (bitmask_bytes(weight.numel()),), offset, bitmask_bytes(weight.numel()))
        values = Entry("BF16", (kept,), offset, 2 * kept)
        stored.append(Stored(name, tuple(weight.shape), values, bitmask if name in linear else None, 0))
        offset += stored[-1].stored_bytes
    assert total == 1_204_881_408
    header = format_header({}, {tensor.name: tensor.values for tensor in stored})
    assert 0.72e9 < sum(tensor.stored_bytes for tensor in stored) + 3 * len(header) < 0.85e9


# --- loading ---


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


# --- folders ---


def test_config_card_and_tokenizer_are_copied_but_no_pickle_and_no_link_that_leads_out(tmp_path):
    sparse_model().save_pretrained(tmp_path / "plain")
    plain = tmp_path / "plain"
    (plain / "README.md").write_text("card")
    (plain / "tokenizer.json").write_text("{}")
    (plain / "training_args.bin").write_bytes(b"x")
    (plain / "state.json").write_bytes(pickle.dumps({}))
    (plain / ".git").mkdir()
    (plain / ".git" / "config").write_text("x")
    (plain / "templates").mkdir()
    (plain / "templates" / "tool.jinja").write_text("x")
    (plain / "LICENSE").symlink_to(plain / "README.md")
    (tmp_path / "secret").write_text("x")
    (plain / "secret.txt").symlink_to(tmp_path / "secret")
    result = compact_folder(plain, tmp_path / "compact")
    found = {
        str(path.relative_to(tmp_path / "compact")) for path in (tmp_path / "compact").rglob("*") if path.is_file()
    }
    kept = {"README.md", "tokenizer.json", "templates/tool.jinja", "LICENSE", "generation_config.json"}
    assert found == {"config.json", "model.safetensors"} | kept
    assert not (tmp_path / "compact" / "LICENSE").is_symlink()
    assert sorted(result.not_copied) == ["secret.txt", "state.json", "training_args.bin"]
    config = json.loads((tmp_path / "compact" / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": METHOD, "version": 1}
    assert config == json.loads((plain / "config.json").read_text())
    expand_folder(tmp_path / "compact", tmp_path / "expanded")
    assert json.loads((tmp_path / "expanded" / "config.json").read_text()) == config


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(folders, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(folders["plain"], blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    compact_folder(snapshot, tmp_path / "compact")
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "compact"), sparse_model())
    for path in list(snapshot.glob("*.safetensors"))[:1]:
        path.unlink()
        path.symlink_to(folders["plain"] / path.name)
    with pytest.raises(ValueError, match="a link that leads out of its folder"):
        compact_folder(snapshot, tmp_path / "other")


def test_a_conversion_rounds_as_torch_does_and_the_config_says_so(folders, tmp_path):
    compact_folder(folders["plain"], tmp_path / "compact", dtype="bfloat16")
    assert json.loads((tmp_path / "compact" / "config.json").read_text())["dtype"] == "bfloat16"
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "compact"), sparse_model(), torch.bfloat16)
    expand_folder(tmp_path / "compact", tmp_path / "expanded")
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "expanded"), sparse_model(), torch.bfloat16)


def test_nothing_is_left_where_a_later_file_is_damaged(folders, tmp_path):
    shutil.copytree(folders["compact"], tmp_path / "compact")
    path = sorted((tmp_path / "compact").glob("*.safetensors"))[-1]
    header, data = split_file(path)
    join_file(path, header, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        expand_folder(tmp_path / "compact", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["compact"]


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00001.safetensors", "/etc/passwd", "a\0.safetensors", "config.json", 3]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(folders, tmp_path, name):
    shutil.copytree(folders["compact"], tmp_path / "compact")
    index = json.loads((tmp_path / "compact" / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (tmp_path / "compact" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no safetensors file of its folder|null (byte|character)|holds no"):
        expand_folder(tmp_path / "compact", tmp_path / "out")


def test_tensors_that_could_be_taken_for_masks_are_refused(tmp_path):
    save_file({"w.bitmask": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"names that end with {BITMASK}"):
        compact_folder(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("claim", [2**60, 2**64 - 1, 10**9])
def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path, claim):
    (tmp_path / "x.safetensors").write_bytes(claim.to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ValueError, match=f"its header claims {claim} bytes and the file has 16"):
        read_header(tmp_path / "x.safetensors")


def test_a_damaged_folder_gives_the_same_tensors_or_a_value_error_in_bounded_memory():
    found = in_process("tests.hostile", "fuzz", 300)
    assert found["refused"] > 200
    assert found["refused"] + found.get("same", 0) == 300


def test_both_ways_hold_less_than_one_tensor(tmp_path):
    """This is the memory in addition to that used before, for a file of four tensors of 16 MB."""
    peaks = in_process(
        "tests.benchmarks.compact", "extra_bytes", str(tmp_path), 16_000_000, 0.8, "float32", 4, **EXACT_MEMORY
    )
    assert peaks["tensor"] == 16_000_000
    assert 0 < peaks["compact"] < peaks["tensor"]
    assert 0 < peaks["expand"] < peaks["tensor"]


# --- the command ---


def test_the_command_goes_both_ways_and_says_what_it_did(folders, tmp_path, capsys):
    shutil.copytree(folders["plain"], tmp_path / "sparsity=0.8,a")
    main([f"model={tmp_path}/sparsity=0.8,a", f"out={tmp_path}/compact"])
    said = capsys.readouterr().out
    assert re.search(r"compact \(\d+\.\d\d kB\): \d\.\d\d times smaller", said)
    assert "15 sparse tensors of 22,016 weights" in said
    main([f"model={tmp_path}/compact", f"out={tmp_path}/plain", "expand=true", "format=json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["num_tensors"], found["num_sparse_tensors"], found["sparse_weights"]) == (21, 15, 22_016)
    assert 0.78 < found["sparsity"] < 0.82
    assert all_tensors(tmp_path / "plain") == all_tensors(folders["plain"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "model has no value: give model=DIR"),
        (["model=nowhere", "out=out"], "nowhere is not a folder"),
        (["model={empty}", "out=out"], "holds no model.safetensors"),
        (["model={plain}", "out={compact}"], "exists: nothing is overwritten"),
        (["model={plain}", "out={plain}/"], "is the model's own folder"),
        (["model={compact}", "out=out"], "is compact already"),
        (["model={plain}", "out=out", "expand=true"], "is not compact"),
        (["model={compact}", "out=out", "expand=true", "dtype=bfloat16"], "have no effect with expand=true"),
        (["model={plain}", "out=out", "dtype=int8"], "dtype=int8 is not known"),
        (["model={plain}", "out=out", "expnd=true"], "did you mean expand"),
        (["model={quantized}", "out=out"], "is quantized by gptq"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_is_said_in_one_sentence(folders, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(folders["plain"], tmp_path / "quantized")
    (tmp_path / "quantized" / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    places = {**folders, "empty": tmp_path / "empty", "quantized": tmp_path / "quantized"}
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**places) for argument in arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_anything_is_written(folders, tmp_path, monkeypatch):
    def disk(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, free))

    needed = sum(path.stat().st_size for path in folders["compact"].glob("*.safetensors"))
    disk(needed // 2)
    with pytest.raises(ValueError, match=r"has 0\.00 GB free, but the result needs"):
        compact_folder(folders["plain"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"has 0\.00 GB free, but the result needs"):
        expand_folder(folders["compact"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    # This is less than the dense model needs, but enough for the compact one.
    disk(needed + folder_module.ROOM_FOR_SMALL_FILES)
    compact_folder(folders["plain"], tmp_path / "out")
    assert (tmp_path / "out").is_dir()
