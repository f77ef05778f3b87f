"""Linear layers that stay sparse in memory: packing, products on CPU and in Triton's interpreter, loading, generation."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from functools import cache
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import sparsity.compact
import sparsity.compact.product as product_module
from sparsity.compact import CompactWeights, SparseLinear, compact_folder, sparse_linears_
from sparsity.compact.packed import coded, concatenate, pack, rounded, rows_of, unpack
from sparsity.compact.replacement import share_storage_
from sparsity.compact.rounding import Rounding, round_values
from tests.commands import run_command
from tests.compact_models import IDS, same_bits, sparse_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1.0), (3, 7, 0.5), (5, 1000, 0.2), (6, 2051, 0.1), (3, 40_000, 0.02), (3, 300, 0.0), (2, 513, 1.0)]


@cache
def kernel() -> ModuleType:
    """Return `sparsity.compact.spmv`, on Triton's interpreter if there is no GPU.

    Triton chooses the interpreter when it is imported, so this imports Triton again, and then restores the first one.
    """
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for GPUs")
    if DEVICE == "cuda":
        return importlib.import_module("sparsity.compact.spmv")
    ours = "sparsity.compact.spmv"
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton" or name == ours}
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for name in before:
            if not name.startswith("triton._C"):
                del sys.modules[name]
        vars(sparsity.compact).pop("spmv", None)
        found = importlib.import_module(ours)
    sys.modules.update(before)
    return found


def weight_of(rows: int, columns: int, density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random weights; if there are more than three rows, one is empty, one is full and one has a -0.0."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) >= density] = 0
    if rows > 3:
        weight[1], weight[2], weight[0, columns // 2] = 0, 1, -0.0
    return weight


def check_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Compare with float64 on the CPU, relative to the sum of absolute products."""
    x, weight = x.cpu().double(), weight.cpu().double()
    expected = F.linear(x, weight, None if bias is None else bias.cpu().double())
    most = F.linear(x.abs(), weight.abs()) + expected.abs()
    epsilon = max(torch.finfo(found.dtype).eps, 1e-6)
    assert ((found.cpu().double() - expected).abs() <= epsilon * (most + 1e-30)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_what_is_packed_comes_back_bit_for_bit_whole_and_in_parts(rows, columns, density, dtype):
    weight = weight_of(rows, columns, density, dtype)
    packed = pack(weight)
    assert same_bits(unpack(packed).contiguous(), weight)
    for first in range(rows):
        for last in range(first, rows + 1):
            assert same_bits(unpack(packed, first, last).contiguous(), weight[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_the_kernel_multiplies_odd_shapes_empty_rows_and_full_rows(rows, columns, density, dtype):
    weight = weight_of(rows, columns, density, dtype)
    x = torch.randn(2, columns).to(dtype)
    bias = torch.randn(rows).to(dtype)
    packed = pack(weight.to(DEVICE))
    check_product(kernel().spmv(packed, x.to(DEVICE)), x, weight)
    check_product(kernel().spmv(packed, x.to(DEVICE), bias.to(DEVICE)), x, weight, bias)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_numba_multiplies_odd_shapes_empty_rows_and_full_rows(monkeypatch, rows, columns, density, dtype, threads):
    cpu = pytest.importorskip("sparsity.compact.cpu", reason="numba is not installed", exc_type=ImportError)
    monkeypatch.setattr(cpu, "LEAST_WEIGHTS", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = weight_of(rows, columns, density, dtype)
    x, bias = torch.randn(2, columns).to(dtype), torch.randn(rows).to(dtype)
    packed = pack(weight)
    if not cpu.can_multiply(packed):
        pytest.skip("stored without bases: made dense a tile at a time")
    check_product(cpu.spmv(packed, x, bias), x, weight, bias)
    codes = rounded(packed)
    check_product(cpu.spmv(codes, x.float()), x, unpack(codes))


def test_a_layer_on_a_cpu_multiplies_a_vector_through_numba_and_a_prompt_a_tile_at_a_time(monkeypatch):
    cpu = pytest.importorskip("sparsity.compact.cpu", reason="numba is not installed", exc_type=ImportError)
    weight = weight_of(40, 300, 0.2)
    layer, calls = SparseLinear.from_dense(weight), []
    product = cpu.spmv
    monkeypatch.setattr(cpu, "spmv", lambda *args: calls.append(len(args[1])) or product(*args))
    for number in (1, 32, 33):
        x = torch.randn(number, 300)
        check_product(layer(x), x, weight)
    assert calls == [1, 32]


def test_a_kernel_multiplies_by_rounded_values_and_scales():
    weight, x = weight_of(7, 2051, 0.3), torch.randn(3, 2051)
    packed = rounded(pack(weight.to(DEVICE)))
    check_product(kernel().spmv(packed, x.to(DEVICE)), x, unpack(packed).cpu())


def test_a_kernel_multiplies_by_some_rows_of_a_matrix_and_by_joined_matrices():
    first, second, x = weight_of(5, 600, 0.3), weight_of(4, 600, 0.3), torch.randn(2, 600)
    for pieces in ([pack(weight.to(DEVICE)) for weight in (first, second)], [rounded(pack(first.to(DEVICE)))] * 2):
        whole = concatenate(pieces)
        dense = torch.cat([unpack(piece) for piece in pieces]).cpu()
        assert same_bits(unpack(whole).cpu().contiguous(), dense.contiguous())
        check_product(kernel().spmv(whole, x.to(DEVICE)), x, dense)
        check_product(kernel().spmv(rows_of(whole, 3, 8), x.to(DEVICE)), x, dense[3:8])


def test_layers_share_one_storage_and_hold_what_they_held():
    layers = [SparseLinear.from_dense(weight_of(rows, 33, 0.3)) for rows in (5, 11)]
    share_storage_(layers)
    assert len({buffer.untyped_storage().data_ptr() for layer in layers for buffer in layer.buffers()}) == 1
    for layer, rows in zip(layers, (5, 11), strict=True):
        assert same_bits(layer.dense().contiguous(), weight_of(rows, 33, 0.3))


@pytest.mark.parametrize(("values", "most"), [("bfloat16", 0.845e9), ("int8", 0.615e9)])
def test_the_1b_model_takes_this_much_memory_with_its_dense_embedding(values, most):
    """A few rows of each layer are enough, because the bytes of a row do not depend on the number of rows."""
    total = 2 * (32_000 + 33) * 2048
    for rows, columns in [(2048, 2048)] * 64 + [(8192, 2048)] * 32 + [(2048, 8192)] * 16 + [(32_000, 2048)]:
        total += bytes_of_a_row(columns, values) * rows
    assert 0.98 * most < total < most


@cache
def bytes_of_a_row(columns: int, values: str) -> float:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(64, columns, generator=generator).bfloat16()
    weight[torch.rand(64, columns, generator=generator) >= 0.2] = 0
    layer = SparseLinear(rounded(pack(weight))) if values == "int8" else SparseLinear.from_dense(weight)
    return sum(buffer.nbytes for buffer in layer.buffers()) / 64


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 2), (1, 4, 4), (2, 2, 4)])
def test_the_kernel_gives_the_same_whatever_its_shape(shape):
    weight = weight_of(7, 2051, 0.3)
    x = torch.randn(1, 2051)
    check_product(kernel().spmv(pack(weight.to(DEVICE)), x.to(DEVICE), None, kernel().Shape(*shape)), x, weight)


def test_weights_far_apart_store_columns_instead_of_distances():
    weight = torch.zeros(3, 70_000)
    weight[0, :31], weight[0, -31:], weight[2, ::7000] = 1.0, 2.0, 3.0
    packed = pack(weight)
    assert packed.bases.numel() == 0
    assert packed.offsets.dtype == torch.int32
    assert torch.equal(unpack(packed), weight)
    x = torch.randn(1, 70_000)
    check_product(kernel().spmv(pack(weight.to(DEVICE)), x.to(DEVICE)), x, weight)


def test_a_kept_weight_of_many_takes_little_more_than_three_bytes():
    packed = pack(weight_of(3, 8192, 0.2, torch.bfloat16))
    assert packed.offsets.dtype == torch.uint8
    assert packed.bases.dtype == torch.uint8
    assert packed.nbytes / int((packed.values != 0).sum()) < 3.2


def test_a_layer_is_multiplied_a_tile_at_a_time_and_its_input_has_gradients(monkeypatch):
    weight, bias = weight_of(11, 33, 0.3), torch.randn(11)
    layer = SparseLinear.from_dense(weight, bias)
    x = torch.randn(2, 3, 33, requires_grad=True)
    for tile in (1 << 22, 99, 1):
        monkeypatch.setattr(product_module, "TILE", tile)
        check_product(layer(x).detach(), x.detach(), weight, bias)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(2, 3, 33), atol=1e-6)
    assert same_bits(layer.dense().contiguous(), weight)
    assert layer.half().values.dtype == torch.float16
    assert layer.offsets.dtype == torch.uint8


def test_dense_and_tied_layers_stay_as_they_are():
    model = nn.ModuleDict({"sparse": nn.Linear(64, 8), "dense": nn.Linear(64, 8), "tied": nn.Linear(64, 8)})
    model["embedding"] = nn.Embedding(8, 64)
    model["tied"].weight = model["embedding"].weight
    with torch.no_grad():
        model["sparse"].weight[:, 10:] = 0
        model["tied"].weight[:, 10:] = 0
    assert sparse_linears_(model) == ["sparse"]
    assert isinstance(model["sparse"], SparseLinear)
    with pytest.raises(ValueError, match=r"use SparseLinear\.from_dense"):
        sparse_linears_(nn.Linear(3, 3).requires_grad_(False), most_density=1.0)


def test_a_folder_loads_with_layers_that_stay_sparse_and_generates_the_same_tokens(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compact", quantization_config=CompactWeights(dequantize=False)
    )
    layers = [name for name, module in found.named_modules() if isinstance(module, SparseLinear)]
    # In each block: one for q, k and v, one for gate and up, and two more.
    assert len(layers) == 9
    assert "lm_head" in layers
    assert not any(isinstance(module, nn.Linear) for module in found.modules())
    with torch.no_grad():
        assert torch.allclose(found(IDS).logits, model(IDS).logits, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(found.generate(IDS, **options), model.generate(IDS, **options))
    with pytest.raises(ValueError, match="not serializable"):
        found.save_pretrained(tmp_path / "again")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", [Rounding(8), Rounding(4)], ids=["int8", "int4"])
def test_codes_of_a_rounded_folder_stay_codes_in_memory(tmp_path, rounding, dtype):
    model = sparse_model().to(dtype)
    model.save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact", rounding=rounding)
    options = CompactWeights(dequantize=False, group=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", quantization_config=options, dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=dtype)
    layers = {name: module for name, module in found.named_modules() if isinstance(module, SparseLinear)}
    assert len(layers) == 15
    x = torch.randn(2, 56).to(dtype)
    for name, layer in layers.items():
        expected = dense.get_submodule(name).weight
        assert layer.values.dtype == torch.int8
        # The weight that the codes stand for is the dense model's, bit for bit. The product is by codes and scales, which are
        # exact, and in bfloat16 the dense model's weights are rounded: so the oracle is the codes' own product in float64.
        assert same_bits(layer.weight.contiguous(), expected.detach().contiguous())
        few = x[:, : layer.in_features]
        check_product(layer(few), few, unpack(layer.packed))
    with torch.no_grad():
        assert torch.allclose(found(IDS).logits, dense(IDS).logits, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert layers["lm_head"].to(torch.float16).scales.dtype == torch.float32
    assert layers["lm_head"].weight.dtype == torch.float16


def test_codes_with_a_scale_for_a_group_of_values_are_expanded_in_memory(tmp_path):
    sparse_model().save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact", rounding=Rounding(4, 64))
    options = CompactWeights(dequantize=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", quantization_config=options)
    assert found.lm_head.values.dtype == torch.float32


def test_a_layer_in_int8_takes_two_bytes_a_kept_weight_instead_of_three():
    weight, held = weight_of(64, 2048, 0.2, torch.bfloat16), {}
    packed = pack(weight)
    codes = rounded(packed)
    restored = codes.values.float() * torch.repeat_interleave(codes.scales, codes.starts.diff().long())[:, None]
    dense = unpack(replace(packed, values=restored.bfloat16()))
    for name, scales in (("bfloat16", None), ("int8", codes.scales)):
        layer = SparseLinear.from_dense(dense, scales=scales)
        held[name] = sum(buffer.nbytes for buffer in layer.buffers()) / int((dense != 0).sum())
    assert held["int8"] < 2.5
    # One byte less for each place of a value, and a scale for each row.
    assert held["bfloat16"] - held["int8"] == pytest.approx(1.0, abs=0.15)


def test_a_layer_in_int8_that_is_converted_to_float32_says_so():
    codes = rounded(pack(weight_of(5, 300, 0.2, torch.bfloat16)))
    layer = SparseLinear(codes, torch.zeros(5, dtype=torch.bfloat16), torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    layer.float()
    assert (layer.weight.dtype, layer.bias.dtype, layer.scales.dtype) == (torch.float32,) * 3


@pytest.mark.parametrize("is_compiled", [False, True])
def test_autocast_has_the_type_of_a_dense_layer_for_few_vectors_and_many(is_compiled):
    weight = weight_of(5, 300, 0.2)
    layer = SparseLinear.from_dense(weight, torch.ones(5))
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
    for num_vectors in (1, 40):
        x = torch.randn(num_vectors, 300, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = call(x), F.linear(x, weight, torch.ones(5))
        assert found.dtype == expected.dtype == torch.bfloat16
        assert torch.allclose(found.float(), expected.float(), atol=0.3)


def test_the_default_type_of_torch_does_not_matter():
    layer = SparseLinear.from_dense(weight_of(5, 300, 0.2))
    few = torch.ones(1, 300)
    expected = layer(few)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert same_bits(layer(few), expected)
        codes, scales = round_values(torch.tensor([127.0, -63.5]), torch.tensor([2]), Rounding(8, rule="absmax"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (codes.tolist(), scales.tolist()) == ([127, -64], [1.0])


def test_scales_that_do_not_give_the_weights_are_not_used():
    weight = weight_of(5, 300, 0.2)
    assert coded(pack(weight), torch.ones(5)) is None
    assert SparseLinear.from_dense(weight, scales=torch.ones(5)).values.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_rehearses_layers_and_a_model_and_writes_down_what_fails(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for GPUs")
    output = str(tmp_path / "d.json")
    command = ["tests.benchmarks.decode", "--rehearse", "--seconds", "500", "--output", output]
    done = run_command(command, timeout_s=580)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "d.json").read_text())}
    assert rows["24 x 96 at 0.2"]["error"] < 0.01
    assert rows["a token of the 1B at 0.2"]["sparse_layers"] == 5
    assert rows["a token of the 1B at 0.2"]["same_tokens"] == "4 of 4"
    assert rows["generate, dynamic cache, grouped"]["baseline"] == "dense, dynamic cache"
    assert "Only CUDA tensors" in rows["torch 2:4"]["failed"]
    assert not [name for name, row in rows.items() if "left_out" in row]
