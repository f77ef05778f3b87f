"""Two and three ranks prune the same weights as one: plain shards, FSDP2, HSDP and DDP over gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sparsity import SparsityCallback
from sparsity.mask import check_replicas_agree
from sparsity.schedule import Geometric
from tests.distributed import run_ranks, shard_by_layers

SHAPES = [(7, 5), (1, 3), (2, 64), (16, 16)]
"""Shapes with odd numbers of rows, and with fewer rows than ranks, so that some shards are empty."""
DENSITIES = [0.9, 0.6, 0.25, 0.05, 0.0]


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES))
    for layer in layers:
        with torch.no_grad():
            if kind == "ties":
                layer.weight.copy_((layer.weight * 20).round())
            if kind == "ones":
                layer.weight.fill_(1.0)
    return layers.to(torch.bfloat16) if kind == "bfloat16" else layers


def full_masks(callback: SparsityCallback) -> list[torch.Tensor]:
    masks = []
    for param, shard in zip(callback.pruner.parameters.values(), callback.shards, strict=True):
        if isinstance(param, DTensor):
            local = shard.mask.view(param.to_local().shape)
            dtensor = DTensor.from_local(
                local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
            )
            masks.append(dtensor.full_tensor())
        else:
            masks.append(shard.mask.view(param.shape).clone())
    return masks


def prune_through(kind: str, layout: str, score: str = "magnitude") -> list[list[torch.Tensor]]:
    """Return the full masks after each event, for a model that is spread over all ranks."""
    model = make_model(kind)
    if layout == "fsdp2":
        shard_by_layers(model, model)
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), score=score)
    callback.bind(model)
    masks = []
    for density in DENSITIES:
        callback.pruner.prune(density)
        masks.append(full_masks(callback))
        for param, mask in zip(model.parameters(), masks[-1], strict=True):
            full = param.full_tensor() if isinstance(param, DTensor) else param
            assert (full[~mask] == 0).all()
    return masks


def assert_equal_masks(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for event, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert torch.equal(a, b), f"event {event}, parameter {index}"


CASES = [
    ("normal", "magnitude"),
    ("ties", "magnitude"),
    ("ones", "magnitude"),
    ("bfloat16", "magnitude"),
    ("ones", "random"),
]


def prune_all(layout: str) -> list[list[list[torch.Tensor]]]:
    return [prune_through(kind, layout, score) for kind, score in CASES]


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("ddp", 2)])
def test_ranks_prune_exactly_what_one_does(layout, world_size):
    expected = prune_all("single")
    for rank_masks in run_ranks(prune_all, world_size, layout):
        for found, case in zip(rank_masks, expected, strict=True):
            assert_equal_masks(found, case)


def globally_smallest() -> bool:
    """Compare the weights pruned on FSDP2 shards with a sort of the whole weights."""
    model = make_model("normal")
    before = torch.cat([param.detach().abs().view(-1).clone() for param in model.parameters()])
    shard_by_layers(model, model)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    callback.pruner.prune(0.3)
    kept = torch.cat([mask.view(-1) for mask in full_masks(callback)])
    num_pruned = round(0.7 * before.numel())
    assert set(torch.sort(before, stable=True).indices[:num_pruned].tolist()) == set(
        (~kept).nonzero().view(-1).tolist()
    )
    return True


def test_the_set_pruned_on_fsdp2_shards_is_the_globally_smallest():
    assert all(run_ranks(globally_smallest, 2))


def disagree() -> str:
    model = make_model("normal")
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    callback.shards[0].mask[dist.get_rank()] = False
    try:
        check_replicas_agree(callback.shards, callback.pruner.layout)
    except RuntimeError as error:
        return str(error)
    return ""


def test_replicas_that_disagree_are_an_error_on_every_rank():
    for message in run_ranks(disagree, 2):
        assert "Replicas disagree on their masks" in message


def count_traffic(columns: int) -> int:
    """Return the bytes passed to collectives in one event."""
    sent = []
    all_reduce = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 64, bias=False), nn.Linear(64, 64, bias=False))
    for layer in model:
        fully_shard(layer)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    dist.all_reduce = counting
    callback.pruner.prune(0.5)
    dist.all_reduce = all_reduce
    return sum(sent)


def count_traffic_of_both() -> tuple[int, int]:
    return count_traffic(64), count_traffic(64 * 64)


def test_traffic_does_not_grow_with_the_model():
    for small, large in run_ranks(count_traffic_of_both, 2):
        assert max(small, large) < 2 << 20
