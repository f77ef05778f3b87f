"""Projections of the same input as one sparse matrix: same results in any order of calls, in generation, and compiled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn
from transformers import (
    CompileConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import sparsity.compact.product as product_module
from sparsity.compact import SparseLinear, sparse_linears_
from sparsity.compact.groups import MOST_UNUSED, GroupedLinear, group_linears_
from sparsity.compact.packed import pack, rounded
from sparsity.prunable import own_linear_weights
from tests.compact_models import IDS, same_bits
from tests.test_sparse_linear import weight_of

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda **kwargs: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES, **kwargs)),
    "qwen2": lambda **kwargs: Qwen2ForCausalLM(
        Qwen2Config(num_key_value_heads=2, tie_word_embeddings=False, **SIZES, **kwargs)
    ),
}


def sparse_model(name: str = "llama", group: bool = True, num_layers: int = 2) -> PreTrainedModel:
    """A model of random weights and biases, 80 % sparse, whose layers are sparse in memory."""
    torch.manual_seed(0)
    model = MODELS[name](num_hidden_layers=num_layers).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.uniform_(0.5, 1.5)
        for weight in own_linear_weights(model).values():
            weight.masked_fill_(torch.rand_like(weight) < 0.8, 0)
    sparse_linears_(model, most_density=1.0, group=group)
    return model


class Projections(nn.Module):
    """Three layers of one input, by the names that make a group."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 6)):
            setattr(self, name, SparseLinear.from_dense(weight_of(rows, 300, 0.2, dtype)))


def separate_and_grouped() -> tuple[Projections, Projections]:
    separate, grouped = Projections(), Projections()
    assert group_linears_(grouped) == [("q_proj", "k_proj", "v_proj")]
    return separate, grouped


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The number of rows of each product that is made."""
    found: list[int] = []
    product = product_module._product

    def recorded(x: Tensor, packed: Any, *others: Any) -> Tensor:
        found.append(packed.rows)
        return product(x, packed, *others)

    monkeypatch.setattr(product_module, "_product", recorded)
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_grouped_layers_give_a_model_the_bits_of_separate_ones(name):
    grouped, separate = sparse_model(name), sparse_model(name, group=False)
    names = {name.rpartition(".")[2] for name, m in grouped.named_modules() if isinstance(m, GroupedLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for ids in (IDS[:1, :1], IDS[:, :3], IDS.repeat(3, 1)):
        assert same_bits(grouped(ids).logits, separate(ids).logits)
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(grouped.generate(IDS, **options), separate.generate(IDS, **options))


@torch.no_grad()
def test_a_decoding_step_makes_one_product_a_group(products):
    sparse_model()(IDS[:1, :1])
    block = [64, 32, 112, 32]
    assert products == [*block, *block, 96]


def test_a_model_without_such_names_keeps_its_layers():
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=2, **SIZES)).eval()
    expected = model(IDS).logits
    assert len(sparse_linears_(model, most_density=1.0)) == 9
    assert not [module for module in model.modules() if isinstance(module, GroupedLinear)]
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("num_inputs", [1, 2])
@pytest.mark.parametrize("order", ["qkv", "vkq", "kqqv", "qkq", "vv"])
@torch.no_grad()
def test_any_order_of_calls_gives_what_separate_layers_give(order, num_inputs):
    separate, grouped = separate_and_grouped()
    inputs = [torch.randn(1, 2, 300) for _ in range(num_inputs)]
    for name in order:
        for x in inputs:
            found = getattr(grouped, f"{name}_proj")(x)
            assert same_bits(found, getattr(separate, f"{name}_proj")(x))
            # A caller may write to what it got.
            found.zero_()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_input_that_is_written_to_between_calls_is_multiplied_anew(context):
    separate, grouped = separate_and_grouped()
    with context():
        x = torch.randn(1, 300)
        assert same_bits(grouped.q_proj(x), separate.q_proj(x))
        x += 1
        assert same_bits(grouped.k_proj(x), separate.k_proj(x))


def test_a_group_is_copied_and_saved_without_results_that_wait():
    separate, grouped = separate_and_grouped()
    x = torch.ones(1, 300, requires_grad=True) * 2
    with torch.no_grad():
        grouped.q_proj(x)
        for copied in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
            assert copied.k_proj.group is copied.q_proj.group
            assert copied.q_proj.group.shelf.held is None
            assert same_bits(copied.k_proj(x), separate.k_proj(x))


@torch.no_grad()
def test_results_of_a_matrix_that_was_loaded_over_or_converted_are_not_used():
    separate, grouped = separate_and_grouped()
    x = torch.ones(1, 300)
    grouped.q_proj(x)
    values = "q_proj.group.values"
    grouped.load_state_dict({**grouped.state_dict(), values: 2 * grouped.state_dict()[values]})
    assert same_bits(grouped.k_proj(x), 2 * separate.k_proj(x))
    grouped.double()
    assert grouped.q_proj.group.shelf.held is None


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_a_caller_may_add_something_trained_to_a_result_in_place(num_vectors):
    _, grouped = separate_and_grouped()
    added = torch.zeros(8, requires_grad=True)
    result = grouped.q_proj(torch.ones(num_vectors, 300))
    result += added
    result.sum().backward()
    assert added.grad is not None
    assert added.grad.tolist() == [num_vectors] * 8


@torch.no_grad()
def test_layers_whose_inputs_differ_stop_multiplying_for_each_other(products):
    _, grouped = separate_and_grouped()
    for _ in range(MOST_UNUSED + 2):
        grouped.q_proj(torch.randn(1, 300))
    assert products == [18] * MOST_UNUSED + [8, 8]


def test_a_prompt_and_a_gradient_go_through_one_layer_alone(products):
    _, grouped = separate_and_grouped()
    with torch.no_grad():
        grouped.k_proj(torch.randn(40, 300))
    x = torch.randn(1, 300, requires_grad=True)
    grouped.k_proj(x).sum().backward()
    assert products == [4, 4]
    assert torch.allclose(x.grad[0], weight_of(4, 300, 0.2).sum(0))
    assert grouped.q_proj.group.shelf.held is None


@torch.no_grad()
def test_layers_of_unlike_density_are_packed_anew_and_unlike_types_stay_apart():
    dense, thin = weight_of(3, 1024, 0.9), weight_of(2, 1024, 0.02)
    parent = nn.Module()
    parent.gate_proj, parent.up_proj = SparseLinear.from_dense(dense), SparseLinear.from_dense(thin)
    assert parent.gate_proj.num_chunks != parent.up_proj.num_chunks
    group_linears_(parent)
    assert same_bits(parent.gate_proj.weight.contiguous(), dense)
    assert same_bits(parent.up_proj.weight.contiguous(), thin)
    x = torch.randn(1, 1024)
    # Sums of float32 in another order.
    assert torch.allclose(parent.gate_proj(x), x @ dense.T, atol=1e-3)
    codes = [SparseLinear(rounded(pack(weight))) for weight in (dense, thin)]
    parent.gate_proj, parent.up_proj = codes
    expected = [layer(x) for layer in codes]
    assert group_linears_(parent) == [("gate_proj", "up_proj")]
    assert torch.allclose(parent.up_proj(x), expected[1], atol=1e-4)
    assert torch.allclose(parent.gate_proj(x), expected[0], atol=1e-3)
    parent.gate_proj, parent.up_proj = codes[0], SparseLinear.from_dense(thin)
    assert group_linears_(parent) == []


@torch.no_grad()
def test_a_model_with_groups_is_copied_and_converted_as_a_whole():
    model = copy.deepcopy(sparse_model()).bfloat16()
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.group is attention.q_proj.group
    assert attention.k_proj.weight.dtype == torch.bfloat16
    assert len([name for name, _ in model.named_buffers() if "q_proj.group.values" in name]) == 2
    assert torch.allclose(model(IDS[:1, :1]).logits.float(), sparse_model()(IDS[:1, :1]).logits, atol=0.1)


# --- compiled ---


def test_compiled_projections_have_one_graph_share_a_product_and_pass_gradients_on(products):
    separate, grouped = separate_and_grouped()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    def project(x: Tensor) -> list[Tensor]:
        return [grouped.q_proj(x), grouped.k_proj(x), grouped.v_proj(x)]

    layers = separate.q_proj, separate.k_proj, separate.v_proj
    few, many = torch.randn(2, 300), torch.randn(40, 300)
    with torch.no_grad():
        for x, expected in ((few, [18]), (many, [8, 4, 6])):
            products.clear()
            found = project(x)
            assert products == expected
            assert all(same_bits(part, layer(x)) for part, layer in zip(found, layers, strict=True))
    few.requires_grad_()
    torch.cat(project(few), -1).sum().backward()
    assert torch.allclose(few.grad, torch.cat([layer.weight for layer in layers]).sum(0).expand(2, -1), atol=1e-5)


def test_generation_with_a_static_cache_compiles_a_step_into_one_graph(products):
    model = sparse_model(num_layers=1)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, **options)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = model.generate(IDS, cache_implementation="static", compile_config=config, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found, expected)
    assert products[-5:] == [64, 32, 112, 32, 96]


def test_the_operator_keeps_the_rules_of_torch():
    layer = SparseLinear.from_dense(weight_of(5, 40, 0.3), torch.randn(5))
    arguments = product_module._arguments(layer.packed, layer.bias, layer.tiles)
    for number in (2, 40):
        x = torch.randn(number, 40, requires_grad=True)
        library.opcheck(product_module._linear, (x, *arguments))
