"""Masks, their hooks and the skipped update under FSDP2 on the device: NCCL on a GPU, gloo on a CPU, one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sparsity import Geometric, SparsityCallback
from train.distributed import World
from train.faults.guard import StepGuard, skips_on_device
from train.faults.preempt import Preemption

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
NUM_KEPT = 154
"""The rounded fifth of the 768 weights of `network`: 768 - round(0.8 * 768)."""


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Make a device mesh of only this process."""
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE.type, (1,))
    dist.destroy_process_group()


class Block(nn.Module):
    """The unit that is sharded and compiled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.silu(self.linear(values))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(16, 24), Block(24, 8), Block(8, 24))


def sharded(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> nn.Sequential:
    model.to(DEVICE)
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def bound(model: nn.Module) -> SparsityCallback:
    callback = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    callback.bind(model)
    return callback


def on_cpu(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def copied_to_cpu(model: nn.Sequential) -> nn.Sequential:
    copy = network()
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            mine.copy_(on_cpu(theirs))
    return copy


def masks_on_cpu(model: nn.Sequential) -> list[Tensor]:
    """Return the expected masks: those of the weights that the CPU keeps in the same model."""
    bound(model).pruner.prune(0.2)
    return [param != 0 for param in model.parameters()]


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 16, generator=generator).to(DEVICE)


@pytest.mark.parametrize("options", [{}, {"mp_policy": BFLOAT16}], ids=["float32", "bfloat16"])
def test_an_event_under_fsdp2_prunes_what_the_cpu_prunes_and_steps_keep_it(mesh, options):
    model = sharded(network(), mesh, **options)
    callback = bound(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=True)
    for step in range(4):
        if step == 1:
            expected = masks_on_cpu(copied_to_cpu(model))
            assert sum(int(mask.sum()) for mask in expected) == NUM_KEPT
            callback.pruner.prune(0.2, optimizer)
            for param, mask in zip(model.parameters(), expected, strict=True):
                assert torch.equal(on_cpu(param) != 0, mask)
        model(inputs()).float().pow(2).mean().backward()
        if step >= 1:
            for param, mask in zip(model.parameters(), expected, strict=True):
                assert (on_cpu(param.grad)[~mask] == 0).all()
                assert (on_cpu(param.grad)[mask] != 0).any()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        if step >= 1:
            for param, mask in zip(model.parameters(), expected, strict=True):
                assert torch.equal(on_cpu(param) != 0, mask)
                for name in ("exp_avg", "exp_avg_sq"):
                    assert (on_cpu(optimizer.state[param][name])[~mask] == 0).all()


class Weighted(nn.Linear):
    """A layer whose weights get the factors of its call as gradients."""

    def forward(self, factors: Tensor) -> Tensor:
        return (self.weight * factors).sum()


def test_a_nan_gradient_of_a_pruned_weight_vanishes_before_the_norm(mesh):
    torch.manual_seed(0)
    layer = Weighted(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.01, 2.0, 3.0], [4.0, 5.0, 0.02, 6.0]]))
    fully_shard(layer.to(DEVICE), mesh=mesh)
    callback = SparsityCallback(Geometric(0.25, 0, 0, 1), report=False)
    callback.bind(layer)
    callback.pruner.prune(0.75)
    layer(torch.tensor([[1.0, float("nan"), 1.0, 1.0], [1.0, 1.0, float("inf"), 1.0]], device=DEVICE)).backward()
    assert on_cpu(layer.weight.grad).tolist() == [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]]
    norm = on_cpu(nn.utils.clip_grad_norm_(layer.parameters(), 1e9))
    assert float(norm) == pytest.approx(6**0.5)


def test_the_optimizers_kernel_skips_the_update_of_a_bad_loss_and_counts_it(mesh):
    model = sharded(network(), mesh, mp_policy=BFLOAT16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    assert skips_on_device(optimizer) == (DEVICE.type == "cuda")
    guard = StepGuard(World(0, 1, DEVICE), Preemption(), max_skipped=10)

    def state() -> list[Tensor]:
        moments = [value for param in model.parameters() for value in optimizer.state[param].values()]
        return [on_cpu(tensor).clone() for tensor in [*model.parameters(), *moments]]

    def update(loss: float, norm: float) -> None:
        model(inputs()).float().pow(2).mean().backward()
        guard.decide_on_device(optimizer, torch.tensor(loss, device=DEVICE), torch.tensor(norm, device=DEVICE))
        optimizer.step()
        optimizer.zero_grad()

    update(1.0, 1.0)
    before = state()
    update(float("nan"), 1.0)
    update(1.0, float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    update(1.0, 1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    guard.read_late_flags()
    assert (guard.num_skipped, guard.num_in_row) == (2, 0)


def test_an_event_between_compiled_steps_recompiles_nothing(mesh):
    torch._dynamo.reset()
    counters.clear()
    model = network()
    for block in model:
        block.compile(backend="inductor" if DEVICE.type == "cuda" else "aot_eager", dynamic=False)
    sharded(model, mesh, mp_policy=BFLOAT16)
    callback = bound(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    graphs = []
    for step in range(5):
        if step in (1, 3):
            callback.pruner.prune(0.5 if step == 1 else 0.2, optimizer)
        model(inputs()).float().pow(2).mean().backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1
    assert graphs == graphs[:1] * 5
    assert sum(int(on_cpu(param).count_nonzero()) for param in model.parameters()) == NUM_KEPT
