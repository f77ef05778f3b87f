"""Code that will meet tensors of a GPU, run on tensors that say they are there: none meets one of the host by mistake."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsity import Geometric, OneShot, SparsityCallback, devices
from sparsity.compact import SparseLinear, sparse_linears_
from sparsity.compact.packed import unpack
from sparsity.mask import mask_hash
from tests.gpu import test_blocks_and_rows_gpu as blocks
from tests.gpu import test_moving_masks_gpu as moving
from tests.pretended_gpu import CPU, pretended_gpu
from tests.test_sparse_linear import check_product, weight_of
from train.muon import MuonAdamW


@pytest.fixture
def gpu(monkeypatch) -> Iterator[torch.device]:
    monkeypatch.setattr(devices, "_launches", lambda device: None)
    with pretended_gpu() as device:
        yield device


def test_a_pretended_gpu_refuses_what_a_real_one_refuses(gpu):
    there = torch.ones(3, device=gpu)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3)[there.long() - 1]
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=gpu, generator=torch.Generator())
    assert (there + torch.tensor(1.0)).device == gpu
    assert there.to(CPU).device == CPU
    layer = nn.Linear(3, 2).to(gpu)
    layer(there).sum().backward()
    assert layer.weight.grad.device == gpu
    assert layer.weight.grad.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("case", moving.CASES)
def test_moving_masks_stay_on_the_device(gpu, case, monkeypatch):
    expected = moving.history(case, CPU, None)
    monkeypatch.setattr(moving, "DEVICE", gpu)
    found = moving.history(case, gpu, None)
    for (masks, weights), (true_masks, true_weights) in zip(found, expected, strict=True):
        assert all(torch.equal(mask, true) for mask, true in zip(masks, true_masks, strict=True))
        assert all(torch.allclose(weight, true) for weight, true in zip(weights, true_weights, strict=True))


@pytest.mark.parametrize("random", [False, True], ids=["magnitude", "random"])
@pytest.mark.parametrize(
    ("pattern", "by_row"), [("4x1", False), ("1x16", False), ("2:4", False), ("unstructured", True)]
)
def test_patterns_and_rows_stay_on_the_device(gpu, pattern, by_row, random):
    found = blocks.masks_on(gpu, pattern, by_row, torch.bfloat16, random)
    expected = blocks.masks_on(CPU, pattern, by_row, torch.bfloat16, random)
    assert all(torch.equal(mask, true) for mask, true in zip(found, expected, strict=True))


def test_activation_norms_stay_on_the_device_in_bfloat16(gpu):
    rows = [torch.randn(1, 33, 64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]
    text = SimpleNamespace(dataset=rows, collate_fn=lambda items: items[0])
    masks = []
    for device in (CPU, gpu):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 32, bias=False)).bfloat16()
        callback = SparsityCallback(OneShot(0.5, 0), score="wanda", scope="row", report=False)
        callback.bind(model.to(device))
        callback.calibrate(model, text)
        callback.prune_at(0)
        assert all(norms.device == device for norms in callback.pruner.input_norms.values())
        masks.append([shard.mask.cpu() for shard in callback.shards])
    assert all(torch.equal(mask, true) for mask, true in zip(*masks, strict=True))


def test_muon_updates_on_the_device_what_it_updates_on_the_cpu(gpu):
    weights = []
    for device in (CPU, gpu):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 8)).to(device)
        matrices = [param for param in model.parameters() if param.dim() == 2]
        others = [param for param in model.parameters() if param.dim() < 2]
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        optimizer = MuonAdamW(groups, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        callback = SparsityCallback(Geometric(0.5, 0, 0, 1), report=False)
        callback.bind(model)
        callback.pruner.prune(0.5, optimizer)
        for _ in range(2):
            model(torch.ones(3, 16, device=device)).square().sum().backward()
            optimizer.step()
            callback.on_optimizer_step(None, None, None, optimizer=optimizer)
            optimizer.zero_grad()
        weights.append([param.detach().cpu() for param in model.parameters()])
    assert all(torch.equal(found, true) for found, true in zip(*weights, strict=True))


def test_the_hash_of_masks_is_made_on_the_device(gpu):
    model = nn.Linear(64, 33, bias=False).to(gpu)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), report=False)
    callback.bind(model)
    before = mask_hash(callback.shards)
    callback.pruner.prune(0.5)
    assert mask_hash(callback.shards) != before


def test_the_host_waits_until_the_weights_of_a_moved_or_converted_layer_are_written(gpu, monkeypatch):
    """A product that starts early reads weights while the kernel launched before it may still write them."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    layer = SparseLinear.from_dense(weight_of(32, 64, 0.2))
    assert waits == []
    layer.to(gpu)
    assert waits == [gpu]
    layer.half()
    assert waits == [gpu, gpu]
    model = nn.Sequential(nn.Linear(64, 32)).to(gpu)
    sparse_linears_(model, most_density=1.0)
    assert waits == [gpu] * 3


@torch.no_grad()
def test_sparse_layers_are_packed_and_multiply_on_the_device(gpu):
    weight, x = weight_of(100, 256, 0.2), torch.randn(2, 256)
    layer = SparseLinear.from_dense(weight.to(gpu))
    assert torch.equal(unpack(layer.packed).cpu(), weight)
    check_product(layer(x.to(gpu)), x, weight)
    model = nn.ModuleDict({name: nn.Linear(256, 100, bias=False) for name in ("q_proj", "k_proj", "v_proj")})
    for one in model.values():
        one.weight.copy_(weight)
    parent = nn.ModuleDict({"attention": model}).to(gpu)
    assert len(sparse_linears_(parent, most_density=0.5)) == 3
    on_gpu = x.to(gpu)
    for one in parent["attention"].values():
        check_product(one(on_gpu), x, weight)
