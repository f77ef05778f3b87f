"""The compact format: bits, sizes, and tensors that come back to the last bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from conf.schema import ModelConfig
from sparsity.common.safetensors_header import Entry, format_header, read_header
from sparsity.compact import METHOD, compact_folder, expand_folder
from sparsity.compact.bitmask import BLOCK, bitmask_bytes, compress, expand, expand_on_device
from sparsity.compact.contents import Stored
from sparsity.compact.files import compact_file, expand_file
from sparsity.prunable import own_linear_weights
from tests.compact_models import same_bits
from tests.hostile import all_tensors, split_file, write_plain
from train.model.build import llama_config

ROOT = Path(__file__).resolve().parents[1]


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
