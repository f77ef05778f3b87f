"""Whole blocks, rows and activation norms on the device, against the same on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sparsity import OneShot, SparsityCallback
from sparsity.event import prune_pool_
from sparsity.pattern import parse_pattern
from sparsity.score import Random, magnitude
from sparsity.shards import ParameterShard

pytestmark = pytest.mark.gpu
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"up": (96, 48), "down": (48, 96)}


def masks_on(device: torch.device, pattern: str, by_row: bool, dtype: torch.dtype, random: bool) -> list[Tensor]:
    """Return the masks after two events."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: (torch.randn(shape, generator=generator) * 8).round() / 8 for name, shape in SHAPES.items()}
    shards = [
        ParameterShard(
            name, weight.view(-1).to(device, dtype, copy=True), torch.ones(4608, dtype=torch.bool, device=device), 0, 4608,
            SHAPES[name],
        )
        for name, weight in weights.items()
    ]  # fmt: skip
    found = []
    for num_pruned in (48 * 32, 48 * 64):
        for pool in [[shard] for shard in shards] if by_row else [shards]:
            score = Random(1) if random else magnitude
            prune_pool_(pool, num_pruned, pattern=parse_pattern(pattern), by_row=by_row, score=score)
        for shard in shards:
            shard.values.masked_fill_(~shard.mask, 0)
        found.append(torch.cat([shard.mask for shard in shards]).cpu())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("random", [False, True], ids=["magnitude", "random"])
@pytest.mark.parametrize(
    ("pattern", "by_row"), [("4x1", False), ("16x1", False), ("1x16", False), ("unstructured", True)]
)
def test_the_device_prunes_the_blocks_and_rows_that_the_cpu_prunes(pattern, by_row, dtype, random):
    for found, expected in zip(
        masks_on(DEVICE, pattern, by_row, dtype, random), masks_on(CPU, pattern, by_row, dtype, random), strict=True
    ):
        assert torch.equal(found, expected)


def test_norms_on_the_device_are_those_of_the_cpu_and_every_row_loses_half():
    rows = [torch.randn(1, 33, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    text = SimpleNamespace(dataset=rows, collate_fn=lambda items: items[0])
    norms = {}
    for device in (CPU, DEVICE):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.GELU(), nn.Linear(96, 32, bias=False)).to(device)
        callback = SparsityCallback(OneShot(0.5, 0), score="wanda", scope="row", report=False)
        callback.bind(model)
        callback.calibrate(model, text)
        callback.prune_at(0)
        norms[device.type] = {name: own.cpu() for name, own in callback.pruner.input_norms.items()}
        for shard in callback.shards:
            assert set(shard.mask.view(shard.shape).sum(dim=1).tolist()) == {shard.shape[1] // 2}
    for name, own in norms["cpu"].items():
        assert torch.allclose(norms[DEVICE.type][name], own, rtol=2e-3), name
