"""N:M patterns: the smallest weights of each block are pruned, in exactly the pattern that sparse matrix units read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers.pytorch_utils import Conv1D

from sparsity import Constant, Geometric, OneShot, SparsityCallback
from sparsity.event import prune_pool_
from sparsity.event.nofm import _take_by_block, candidates
from sparsity.pattern import NofM, parse_pattern
from sparsity.score import Random, magnitude
from sparsity.shards import ParameterShard
from tests.kernel_oracles import HostReads


def shard_of(rows: list[list[float]]) -> ParameterShard:
    values = torch.tensor(rows).view(-1)
    return ParameterShard("weight", values, torch.ones(len(values), dtype=torch.bool), 0, len(values))


BLOCKS = [  # values, weights of the block in the order in which they go
    ([4.0, -3.0, 2.0, -1.0], [3, 2]),
    ([1.0, 1.0, 1.0, 1.0], [0, 1]),
    ([0.0, -0.0, 0.0, 5.0], [0, 1]),
    ([float("nan"), 1.0, float("inf"), 2.0], [1, 3]),
    ([2.0, 1.0, 2.0, 1.0], [1, 3]),
]


@pytest.mark.parametrize(("block", "gone"), BLOCKS)
def test_the_smallest_of_a_block_go_and_of_equals_the_first(block, gone):
    chosen = candidates(shard_of([block]), NofM(2, 4), magnitude)
    assert chosen.nonzero().view(-1).tolist() == sorted(gone)


def test_what_was_pruned_before_goes_before_a_survivor_that_is_zero():
    shard = shard_of([[0.0, 5.0, 0.0, 0.0]])
    shard.mask[2] = shard.mask[3] = False
    assert candidates(shard, NofM(2, 4), magnitude).tolist() == [False, False, True, True]


@pytest.mark.parametrize("score", [magnitude, Random(1)], ids=["magnitude", "random"])
def test_a_window_takes_the_smallest_candidates_of_all_blocks_and_ends_with_the_pattern(score):
    torch.manual_seed(0)
    weights = torch.randn(6, 8)
    shard = shard_of(weights.tolist())
    lost = torch.zeros(48, dtype=torch.bool)
    for num_pruned in (5, 11, 24):
        allowed = candidates(shard, NofM(2, 4), score)
        prune_pool_([shard], num_pruned, pattern=NofM(2, 4), score=score)
        assert int((~shard.mask).sum()) == num_pruned
        assert not (lost & shard.mask).any()
        assert not (~shard.mask & ~allowed).any()
        if score is magnitude:
            survivors = shard.values.abs()[shard.mask & allowed]
            assert num_pruned == 24 or shard.values.abs()[~shard.mask].max() <= survivors.min()
        lost = ~shard.mask
        shard.values[lost] = 0
    assert (lost.view(-1, 4).sum(dim=1) == 2).all()
    with pytest.raises(ValueError, match="lets 24 weights go, not 25"):
        prune_pool_([shard], 25, pattern=NofM(2, 4))


def pruned_layer(dtype: torch.dtype, device: str = "cpu", shape: tuple[int, int] = (64, 128)) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device=device)
    callback = SparsityCallback(OneShot(0.5, 0), pattern="2:4")
    callback.bind(layer)
    callback.prune_at(0)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_2_of_4_layer_passes_through_torchs_compressed_form_to_the_last_bit(dtype):
    weight = pruned_layer(dtype).weight.detach()
    compressed, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert compressed.shape == (64, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(compressed, metadata), weight)
    dense = torch.randn(64, 128, dtype=dtype)
    compressed, metadata = sparse_semi_structured_from_dense_cutlass(dense)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(compressed, metadata), dense)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_2_of_4_layer_multiplies_on_sparse_tensor_cores_as_it_does_densely(dtype):
    layer = pruned_layer(dtype, "cuda", (256, 512))
    inputs = torch.randn(128, 512, dtype=dtype, device="cuda")
    with torch.no_grad():
        expected = layer(inputs)
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight))
        assert torch.equal(layer.weight.to_dense(), pruned_layer(dtype, "cuda", (256, 512)).weight)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-2, atol=1e-2)


def test_candidates_taken_by_blocks_are_those_of_a_boolean_index():
    values = torch.randn(60, generator=torch.Generator().manual_seed(0))
    for pattern in (NofM(2, 4), NofM(1, 4), NofM(4, 5)):
        chosen = candidates(shard_of(values.tolist()), pattern, magnitude)
        with HostReads() as reads:
            taken = _take_by_block(values, chosen, pattern)
        assert reads.found == []
        assert torch.equal(taken, values[chosen])


BAD_PATTERNS = [
    ("4:2", "pattern=4:2 is not known"),
    ("2:2", "pattern=2:2 is not known"),
    ("0:4", "pattern=0:4 is not known"),
    ("124", "in yaml it needs quotes"),
    ("block", "choose unstructured, N:M with N below M"),
]


@pytest.mark.parametrize(("text", "message"), BAD_PATTERNS)
def test_what_is_no_pattern_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


BAD_MODELS = [
    (nn.Linear(6, 4), r"multiple of 4 inputs, and weight has the shape \[4, 6\]"),
    (nn.Sequential(Conv1D(8, 8)), "0.weight is a Conv1D's"),
]


@pytest.mark.parametrize(("model", "message"), BAD_MODELS)
def test_a_layer_that_the_pattern_does_not_fit_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        SparsityCallback(OneShot(0.5, 0), pattern="2:4").bind(model)


@pytest.mark.parametrize("sparsity", [0.4, 0.8])
def test_a_schedule_that_ends_elsewhere_than_the_pattern_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"pattern=2:4 ends at a sparsity of 0.5, not {sparsity}"):
        SparsityCallback(Geometric(sparsity, 0, 4, 1), pattern="2:4")


def test_zeros_that_leave_the_pattern_no_room_are_refused():
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight[1, 4:7] = 0
    callback = SparsityCallback(Constant(0.5), pattern="2:4", keep_zeros=True)
    callback.bind(layer)
    with pytest.raises(ValueError, match="1 blocks of 4 weights have more than 2 zeros"):
        callback.pruner.inherit()
