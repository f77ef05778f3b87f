"""Compact files whose kept values are rounded to 8 or 4 bits, and which hold the starts of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eval.model.compact import main
from sparsity.compact import compact_folder, expand_folder
from sparsity.compact.files import check_file, compact_file, expand_file
from sparsity.compact.pieces import How
from sparsity.compact.rounding import Rounding, read_codes, restore_values, round_values, row_counts, stored_codes
from tests.compact_models import check_equal, same_bits, sparse_model
from tests.hostile import all_tensors, join_file, split_file, write_plain
from tests.test_compact import blocks_of_the_document

INT8, INT4 = Rounding(8), Rounding(4, 64)
ROUNDINGS = [INT8, INT4, Rounding(8, 32, "absmax"), Rounding(4, 0, "absmax")]


def write_sparse(path: Path, rows: int = 40, columns: int = 256, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.8] = 0
    weight = weight.to(dtype)
    save_file({"w": weight}, path)
    return weight


# --- arithmetic ---


def test_a_code_is_a_value_over_its_rows_scale():
    values = torch.tensor([1.0, -2.0, 0.5, 12.7, -0.1, 0.0])
    codes, scales = round_values(values, torch.tensor([0, 3, 3]), Rounding(8, 0, "absmax"))
    assert codes.tolist() == [64, -127, 32, 127, -1, 0]
    assert scales.tolist() == pytest.approx([0, 2 / 127, 0.1])
    assert restore_values(codes, scales, torch.tensor([0, 3, 3]))[3].item() == pytest.approx(12.7)


def test_four_bit_codes_lie_two_to_a_byte_the_first_in_the_low_half():
    codes = torch.tensor([1, -1, 7, -7, 3], dtype=torch.int8)
    stored = stored_codes(codes, Rounding(4))
    assert stored.tolist() == [0xF1, 0x97, 0x03, 0, 0, 0, 0, 0]
    assert read_codes(torch.from_numpy(stored), 5).tolist() == codes.tolist()
    assert stored_codes(codes, Rounding(4, 16)).shape == (1, 8)


def test_the_least_squared_error_clips_an_outlier_that_the_largest_magnitude_serves():
    values = torch.full((1024,), 0.1)
    values[0] = 1.0
    sizes = torch.tensor([1024])
    errors = {}
    for rule in ("absmax", "mse"):
        codes, scales = round_values(values, sizes, Rounding(4, 0, rule))
        errors[rule] = float((restore_values(codes, scales, sizes) - values).square().sum())
    assert errors["mse"] < 0.9 * errors["absmax"]


@pytest.mark.parametrize("columns", [8, 7, 1])
def test_kept_weights_are_counted_by_row(columns):
    keep = torch.rand(5, columns, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = torch.zeros(64 * -(-keep.numel() // 64), dtype=torch.uint8)
    bits[: keep.numel()] = keep.view(-1)
    mask = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
    assert row_counts(mask, (5, columns)).tolist() == keep.sum(1).tolist()


def test_groups_that_split_a_byte_word_and_values_without_a_code_are_refused(tmp_path):
    with pytest.raises(ValueError, match="group=40 is not a multiple of 16"):
        Rounding(4, 40)
    save_file({"w": torch.tensor([[torch.inf] + [0.0] * 255])}, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"w cannot be rounded .*infinite or NaN"):
        compact_file(tmp_path / "plain", tmp_path / "compact", how=How(rounding=INT8))


# --- files ---


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_the_reader_in_the_document_reads_what_expanding_gives(tmp_path, rounding):
    write_plain(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact", rounding=rounding, row_starts=True)
    expand_folder(tmp_path / "compact", tmp_path / "expanded")
    [reader] = [block for block in blocks_of_the_document("python") if "def read_compact" in block]
    names = {}
    exec(reader, names)
    found = {}
    for file in (tmp_path / "compact").glob("*.safetensors"):
        found.update(names["read_compact"](file.read_bytes()))
    expanded, plain = all_tensors(tmp_path / "expanded"), all_tensors(tmp_path / "plain")
    assert {name: (shape, bits) for name, (_, shape, bits) in found.items()} == {
        name: (shape, bits) for name, (_, shape, bits) in expanded.items()
    }
    # Dense tensors and integers are not rounded, and types stay the same.
    assert {name: kind for name, (kind, _, _) in expanded.items()} == {
        name: kind for name, (kind, _, _) in plain.items()
    }
    assert {name for name in plain if expanded[name] != plain[name]} == {"a", "b", "c"}


@pytest.mark.parametrize(("rounding", "most_bits"), [(INT8, 2.75), (INT4, 1.95)], ids=["int8", "int4"])
def test_eighty_percent_sparse_weights_take_few_bits(tmp_path, rounding, most_bits):
    weight = write_sparse(tmp_path / "plain", 512, 1024)
    [stored] = compact_file(tmp_path / "plain", tmp_path / "compact", how=How(rounding=rounding))
    assert 8 * stored.stored_bytes / weight.numel() < most_bits
    expand_file(tmp_path / "compact", tmp_path / "expanded")
    found = load_file(tmp_path / "expanded")["w"].float()
    assert (found - weight.float()).norm() / weight.float().norm() < (0.02 if rounding.bits == 8 else 0.15)
    assert bool((found[weight == 0] == 0).all())


def test_a_file_is_of_version_1_until_it_holds_what_only_version_2_has(tmp_path):
    write_sparse(tmp_path / "plain")
    for how, version in ((How(), 1), (How(rounding=INT8), 2), (How(row_starts=True), 2)):
        compact_file(tmp_path / "plain", tmp_path / "compact", how=how)
        header, data = split_file(tmp_path / "compact")
        contents = json.loads(header["__metadata__"]["sparsellm-compact"])
        assert contents["version"] == version
    contents["version"] = 1
    header["__metadata__"]["sparsellm-compact"] = json.dumps(contents)
    join_file(tmp_path / "compact", header, data)
    with pytest.raises(ValueError, match="holds what only version 2 has"):
        check_file(tmp_path / "compact")


def test_row_starts_say_where_a_rows_kept_values_begin(tmp_path):
    weight = write_sparse(tmp_path / "plain")
    compact_file(tmp_path / "plain", tmp_path / "compact", how=How(row_starts=True))
    found = load_file(tmp_path / "compact")
    starts = found["w.bitmask_row_starts"].tolist()
    assert starts[0] == 0
    assert found["w"][starts[7] : starts[8]].tolist() == weight[7][weight[7] != 0].tolist()
    expand_file(tmp_path / "compact", tmp_path / "expanded")
    assert same_bits(load_file(tmp_path / "expanded")["w"], weight)


@pytest.mark.parametrize(
    ("place", "value"), [("kept", 3), ("kept", -1), ("kept", 1 << 62), ("row_starts", 1), ("bits", 8)], ids=str
)
def test_numbers_that_contradict_the_parts_are_refused(tmp_path, place, value):
    write_sparse(tmp_path / "plain")
    compact_file(tmp_path / "plain", tmp_path / "compact", how=How(rounding=INT4, row_starts=True))
    header, data = split_file(tmp_path / "compact")
    contents = json.loads(header["__metadata__"]["sparsellm-compact"])
    contents["tensors"]["w"][place] = value
    header["__metadata__"]["sparsellm-compact"] = json.dumps(contents)
    join_file(tmp_path / "compact", header, data)
    with pytest.raises(ValueError, match=r"not a sound compact file .*'w'"):
        check_file(tmp_path / "compact")


# --- loading ---


@pytest.mark.parametrize("rounding", [INT8, INT4], ids=["int8", "int4"])
def test_transformers_loads_a_rounded_folder_as_the_expanded_one(tmp_path, rounding):
    sparse_model().save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    compact_folder(tmp_path / "plain", tmp_path / "compact", rounding=rounding, row_starts=True)
    expand_folder(tmp_path / "compact", tmp_path / "expanded")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded")
    assert "quantization_config" not in json.loads((tmp_path / "expanded" / "config.json").read_text())
    for dtype in (torch.float32, torch.bfloat16):
        check_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=dtype), expected, dtype)


def test_the_command_rounds_and_writes_the_perplexity_into_figures_and_card(tmp_path, capsys, monkeypatch):
    sparse_model().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("# A model\n")
    (tmp_path / "text.txt").write_text("words")
    given = iter((20.0, 20.25))
    monkeypatch.setattr("eval.model.perplexity.token_perplexity", lambda folder, text: next(given))
    main([
        f"model={tmp_path / 'plain'}", f"out={tmp_path / 'compact'}", "values=int4", f"text={tmp_path / 'text.txt'}",
        "format=json",
    ])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["values"], found["perplexity_before"], found["perplexity_after"]) == ("int4", 20.0, 20.25)
    card = (tmp_path / "compact" / "README.md").read_text()
    assert card.startswith("# A model\n\n## Compact weights\n")
    assert "rounded to int4" in card
    assert "Token perplexity on `text.txt`, disjoint windows: 20.250, before 20.000" in card
    with pytest.raises(SystemExit):
        main([f"model={tmp_path / 'plain'}", f"out={tmp_path / 'no'}", "values=int4", "group=24"])
    assert "group=24 is not a multiple of 16" in capsys.readouterr().err
