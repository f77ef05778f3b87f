"""Masks that move, on the device under FSDP2, against the same updates on the CPU without it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from sparsity import Constant, Cubic, Geometric, SparsityCallback
from sparsity.schedule import Alternating
from sparsity.shards import local_tensor
from sparsity.update import AcDc, Rigl, Set, Ste
from tests.distributed import mesh_of_one

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
NUM_STEPS = 12
CASES: dict[str, dict[str, Any]] = {
    "set": {"schedule": Constant(0.6), "update": Set(0.5, 3, 0.75), "scope": "uniform"},
    "rigl": {"schedule": Constant(0.6), "update": Rigl(0.5, 3, 0.75), "scope": "erk"},
    "granet": {"schedule": Cubic(0.7, 1, 7, 2), "update": Rigl(0.5, 3, 0.75)},
    "ste": {"schedule": Geometric(0.7, 1, 7, 3), "update": Ste(0.5, 3, 0.75), "scope": "uniform"},
    "acdc": {"schedule": Alternating(0.6, 2, 8, 3), "update": AcDc()},
    "saliency": {"schedule": Cubic(0.7, 1, 7, 2), "score": "saliency"},
    "normalized": {"schedule": Cubic(0.7, 1, 7, 2), "normalize": "rms", "factors": {"1*": 0.3}},
}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with mesh_of_one(DEVICE) as mesh:
        yield mesh


class Weighted(nn.Linear):
    """A layer whose weights get as gradients the numbers that it is called with, so that every device has the same."""

    def forward(self, numbers: Tensor) -> Tensor:
        return (self.weight * numbers).sum()


class Layers(nn.ModuleList):
    def forward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        losses = []
        for layer in self:
            numbers = torch.randn(layer.out_features, layer.in_features, generator=generator)
            losses.append(layer(numbers.to(DEVICE if layer.weight.is_cuda else CPU)))
        return torch.stack(losses).sum()


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on the CPU; one whose shard is given beside its parameter is gathered first."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, like.device_mesh, like.placements, run_check=False)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def history(case: str, device: torch.device, mesh: DeviceMesh | None) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return masks and weights after every step."""
    torch.manual_seed(0)
    model = Layers([Weighted(48, 64, bias=False), Weighted(64, 33, bias=False)]).to(device)
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = dict(CASES[case])
    callback = SparsityCallback(options.pop("schedule"), seed=3, report=False, **options)
    callback.bind(model)
    callback.rule.prepare(NUM_STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, fused=True)
    found = []
    for step in range(NUM_STEPS):
        state = TrainerState(global_step=step)
        callback.on_step_begin(None, state, None, optimizer=optimizer)
        model(step).backward()
        callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(None, state, None, optimizer=optimizer)
        optimizer.zero_grad()
        parameters = callback.pruner.parameters.values()
        masks = [
            whole(shard.mask.view(local_tensor(param).shape), param)
            for param, shard in zip(parameters, callback.shards, strict=True)
        ]
        found.append((masks, [whole(param, param) for param in parameters]))
    return found


@pytest.mark.parametrize("case", CASES)
def test_masks_move_on_the_device_as_on_the_cpu(mesh, case):
    expected = history(case, CPU, None)
    found = history(case, DEVICE, mesh)
    counts = {sum(int(mask.sum()) for mask in masks) for masks, _ in expected}
    changes = sum(
        any(not torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        for before, after in pairwise(expected)
    )
    assert changes >= 2
    assert min(counts) < 0.45 * (48 * 64 + 64 * 33)
    for step, ((masks, weights), (true_masks, true_weights)) in enumerate(zip(found, expected, strict=True)):
        for mask, true_mask in zip(masks, true_masks, strict=True):
            assert torch.equal(mask, true_mask), step
        for weight, true_weight in zip(weights, true_weights, strict=True):
            torch.testing.assert_close(weight, true_weight, rtol=1e-4, atol=1e-6)
