"""Two gloo ranks share one device: real shards of CUDA tensors, and an event's counts exchanged between the ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparsity import Geometric, SparsityCallback
from sparsity.shards import local_tensor
from tests.distributed import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
NUM_STEPS = 3
DENSITY = 0.2


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network() -> nn.Sequential:
    """Return layers with even and odd numbers of rows for two ranks, and with many equal weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 7, bias=False))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_((param * 40).round() / 40 + 1 / 80)
    return model


def bound(model: nn.Module) -> SparsityCallback:
    callback = SparsityCallback(Geometric(1 - DENSITY, 0, 0, 1), report=False)
    callback.bind(model)
    return callback


def sharded() -> nn.Sequential:
    model = network().to(device())
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for index in (0, 2):
        fully_shard(model[index], mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def shards_of(model: nn.Module) -> list[torch.Tensor]:
    """Return this rank's rows of each weight, on the CPU."""
    return [local_tensor(param.detach()).cpu() for param in model.parameters()]


def batch() -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


def prune_shards() -> tuple[list[torch.Tensor], int, str]:
    model = sharded()
    callback = bound(model)
    callback.pruner.prune(DENSITY)
    return shards_of(model), sum(callback.kept.values()), next(model.parameters()).device.type


def train(model: nn.Module) -> list[float]:
    """Train for a few steps, with pruning before the last, and return their losses."""
    callback = bound(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            callback.pruner.prune(DENSITY, optimizer)
        loss = model(batch().to(next(model.parameters()).device)).pow(2).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
    return losses


def train_shards() -> tuple[list[float], list[torch.Tensor]]:
    model = sharded()
    return train(model), shards_of(model)


def test_two_ranks_on_one_device_prune_what_one_process_on_the_cpu_does():
    expected = network()
    bound(expected).pruner.prune(DENSITY)
    first, second = run_ranks(prune_shards, 2, on_gpu=True, timeout_s=300)
    assert first[2] == second[2] == device().type
    assert first[1] == second[1] == round(DENSITY * (32 * 64 + 64 * 7))
    for mine, other, whole in zip(first[0], second[0], expected.parameters(), strict=True):
        assert len(mine) < len(whole)
        assert torch.equal(torch.cat([mine, other]), whole)


def test_two_ranks_on_one_device_train_as_one_process_on_the_cpu_does():
    alone = network()
    expected = train(alone)
    (first, rows), (second, more) = run_ranks(train_shards, 2, on_gpu=True, timeout_s=300)
    assert first == second == pytest.approx(expected, rel=1e-4)
    assert sum(int(torch.cat(pair).count_nonzero()) for pair in zip(rows, more, strict=True)) == round(
        DENSITY * sum(param.numel() for param in alone.parameters())
    )
