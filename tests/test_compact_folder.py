"""Folders are compacted and expanded completely or not at all, within bounds of memory and disk, and by the command."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import sparsity.compact.folder as folder_module
from eval.compact import main
from sparsity.common.safetensors_header import read_header
from sparsity.compact import METHOD, compact_folder, expand_folder
from sparsity.compact.contents import BITMASK
from tests.benchmarks.common import EXACT_MEMORY, in_process
from tests.compact_models import check_equal, sparse_model, write_folders
from tests.hostile import all_tensors, join_file, split_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("compact"))


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
