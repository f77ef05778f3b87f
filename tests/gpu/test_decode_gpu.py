"""Sparse layers on a GPU: the compiled kernel against the CPU, under a captured graph, in generation, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CompileConfig

from sparsity.compact import CompactWeights, SparseLinear, compact_folder, sparse_linears_
from sparsity.compact.packed import pack, rounded, unpack
from sparsity.compact.product import MOST_VECTORS
from sparsity.compact.rounding import Rounding
from tests.compact_models import IDS, same_bits, sparse_model
from tests.test_sparse_groups import sparse_model as grouped_model
from tests.test_sparse_linear import DTYPES, check_product, weight_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPES = [(2048, 8192, 0.2), (3001, 2049, 0.5), (777, 11_008, 0.1), (64, 40_001, 0.02)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "density"), SHAPES)
def test_the_compiled_kernel_multiplies_as_the_cpu_does(rows, columns, density, dtype):
    from sparsity.compact.spmv import spmv

    weight = weight_of(rows, columns, density, dtype)
    packed = pack(weight.cuda())
    assert same_bits(unpack(packed).cpu().contiguous(), weight)
    x, bias = torch.randn(3, columns).to(dtype), torch.randn(rows).to(dtype)
    found = spmv(packed, x.cuda(), bias.cuda())
    check_product(found, x, weight, bias)
    assert same_bits(spmv(packed, x.cuda(), bias.cuda()).cpu(), found.cpu())


def test_every_shape_of_the_sweep_multiplies_right():
    from sparsity.compact.spmv import Shape, spmv

    weight = weight_of(2048, 2048, 0.2, torch.bfloat16)
    packed, x = pack(weight.cuda()), torch.randn(1, 2048).bfloat16()
    for shape in ((1, 2, 2), (8, 1, 8), (4, 2, 8), (2, 4, 8), (1, 4, 4)):
        check_product(spmv(packed, x.cuda(), None, Shape(*shape)), x, weight)


def test_a_few_vectors_are_captured_in_a_graph_and_many_give_the_same():
    weight = weight_of(1000, 2048, 0.2)
    layer, x = SparseLinear.from_dense(weight.cuda()), torch.randn(64, 2048)
    on_gpu = x.cuda()
    with torch.no_grad():
        few = layer(on_gpu[:MOST_VECTORS])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(on_gpu[:MOST_VECTORS])
        graph.replay()
        many = layer(on_gpu)
    check_product(few, x[:MOST_VECTORS], weight)
    assert same_bits(captured.cpu(), few.cpu())
    expected = F.linear(x.double(), weight.double())
    assert torch.allclose(many.cpu().double(), expected, atol=1e-3)


def test_products_that_start_early_give_the_bits_of_those_that_wait():
    """In a chain each product reads what the previous one wrote, in memory that is reused again and again."""
    from sparsity.compact.spmv import spmv

    packed = [pack((weight_of(2048, 2048, 0.2) / 16).bfloat16().cuda()) for _ in range(4)]
    start = torch.randn(1, 2048).bfloat16().cuda()
    results = []
    for early in (False, True):
        if early and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("a GPU before Hopper cannot start early")
        x = start.clone()
        graph = torch.cuda.CUDAGraph()
        spmv(packed[0], x, early=early)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = x
            for number in range(40):
                y = spmv(packed[number % 4], y, early=early)
                y = torch.tanh(y) if number % 3 == 0 else y
        for _ in range(20):
            graph.replay()
        results.append(y.cpu())
    assert bool(results[0].isfinite().all())
    assert same_bits(*results)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_several_vectors_and_rounded_values_multiply_as_the_cpu_does(number):
    from sparsity.compact.spmv import spmv

    weight, x = weight_of(2048, 8192, 0.2, torch.bfloat16), torch.randn(number, 8192).bfloat16()
    packed = pack(weight.cuda())
    check_product(spmv(packed, x.cuda()), x, weight)
    codes = rounded(packed)
    check_product(spmv(codes, x.cuda()), x, unpack(codes).cpu())


def test_layers_that_share_a_storage_waste_none_of_it():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    weights = [weight_of(2000, 3000, 0.2, torch.bfloat16).cuda() for _ in range(4)]
    model = torch.nn.Sequential(*(torch.nn.Linear(3000, 2000, bias=False) for _ in range(4))).bfloat16().cuda()
    for layer, weight in zip(model, weights, strict=True):
        layer.weight = torch.nn.Parameter(weight)
    del weights, layer, weight
    assert len(sparse_linears_(model)) == 4
    held = sum(buffer.nbytes for buffer in model.buffers())
    assert torch.cuda.memory_allocated() - before < held + (2 << 20)


def test_a_layer_takes_the_bytes_of_its_kept_weights_and_their_columns():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    layer = SparseLinear.from_dense(weight_of(4096, 4096, 0.2, torch.bfloat16).cuda())
    held = sum(buffer.nbytes for buffer in layer.buffers())
    # The values, half as many bytes for their columns, empty slots between groups, and the groups' bases.
    assert held < 0.37 * 2 * 4096 * 4096
    assert torch.cuda.memory_allocated() - before < 1.05 * held
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        layer(torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16))
    assert torch.cuda.max_memory_allocated() - before < 1.1 * held


def test_a_model_that_stays_sparse_generates_the_tokens_of_the_dense_one(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    sparse = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compact", quantization_config=CompactWeights(dequantize=False), device_map="cuda"
    )
    assert sum(isinstance(module, SparseLinear) for module in sparse.modules()) == 9
    options = {"max_new_tokens": 16, "do_sample": False}
    with torch.no_grad():
        found, expected = sparse(IDS[:1, :1].cuda()).logits.cpu(), model(IDS[:1, :1]).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(sparse.generate(IDS[:1].cuda(), **options).cpu(), model.generate(IDS[:1], **options))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_grouped_layers_multiply_as_separate_ones_and_as_the_cpu_does(name):
    expected = grouped_model(name)
    grouped, separate = grouped_model(name).cuda(), grouped_model(name, group=False).cuda()
    for ids in (IDS[:1, :1], IDS[:, :3], IDS):
        logits = expected(ids).logits
        # Sums in another order: a larger matrix may have another shape of the kernel.
        assert torch.allclose(grouped(ids.cuda()).logits.cpu(), logits, atol=1e-4)
        assert torch.allclose(separate(ids.cuda()).logits.cpu(), logits, atol=1e-4)


@torch.no_grad()
def test_a_static_cache_compiles_sparse_layers_into_a_cuda_graph():
    expected, model = grouped_model("llama"), grouped_model("llama").cuda()
    options = {"max_new_tokens": 12, "do_sample": False}
    config = CompileConfig(fullgraph=True)
    assert config.mode == "reduce-overhead"
    torch._dynamo.reset()
    for _ in range(2):
        found = model.generate(IDS[:1].cuda(), cache_implementation="static", compile_config=config, **options)
        assert torch.equal(found.cpu(), expected.generate(IDS[:1], **options))


def test_a_compiled_layer_multiplies_few_and_many_vectors_and_its_input_has_gradients():
    weight, bias = weight_of(1000, 2048, 0.2), torch.randn(1000)
    layer = SparseLinear.from_dense(weight.cuda(), bias.cuda())
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for number in (1, 64):
        x = torch.randn(number, 2048)
        with torch.no_grad():
            check_product(compiled(x.cuda()), x, weight, bias)
    x = torch.randn(2, 2048, device="cuda", requires_grad=True)
    compiled(x).sum().backward()
    assert torch.allclose(x.grad.cpu(), weight.sum(0).expand(2, -1), atol=1e-3)


def test_codes_of_a_rounded_folder_stay_codes_in_memory(tmp_path):
    sparse_model().bfloat16().save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact", rounding=Rounding(8))
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    sparse = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compact", quantization_config=CompactWeights(dequantize=False, group=False), **options
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype=torch.bfloat16)
    for name, layer in sparse.named_modules():
        if isinstance(layer, SparseLinear):
            assert layer.values.dtype == torch.int8
            assert same_bits(layer.weight.cpu().contiguous(), dense.get_submodule(name).weight.detach())
            x = torch.randn(2, layer.in_features).bfloat16()
            with torch.no_grad():
                check_product(layer(x.cuda()), x, unpack(layer.packed).cpu())
