"""The GPU's kernels against torch's own operations: on a GPU where there is one, else under Triton's interpreter."""

import importlib
from itertools import pairwise

import pytest
import torch

from sparsity import scan, select
from sparsity.score import magnitude
from sparsity.shards import ParameterShard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for GPUs")
    return importlib.reload(importlib.import_module("sparsity.kernels"))


def make_shards(kind: str) -> list[ParameterShard]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in (9_000, 1, 0, 333)]
    if kind == "ties":
        tensors = [(tensor * 3).round() for tensor in tensors]
    elif kind == "denormal":
        tensors = [tensor * 1e-42 for tensor in tensors]
    elif kind in ("bfloat16", "float16"):
        tensors = [(tensor * 1e-5).to(getattr(torch, kind)) for tensor in tensors]
    tensors[0][:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    return [
        ParameterShard(f"p{i}", t.to(DEVICE), torch.ones(len(t), dtype=torch.bool, device=DEVICE), 0, len(t))
        for i, t in enumerate(tensors)
    ]


def sorted_keys(found: scan.Collected) -> list[list[int]]:
    return [sorted(found.keys[start:stop].tolist()) for start, stop in pairwise(found.starts)]


@pytest.mark.parametrize("kind", ["normal", "ties", "denormal", "bfloat16", "float16"])
def test_the_kernel_collects_what_torch_collects(kernels, monkeypatch, kind):
    monkeypatch.setattr(scan, "kernels", lambda: kernels)
    shards = make_shards(kind)
    keys = torch.sort(torch.cat([magnitude(s, slice(0, len(s.values))) for s in shards])).values.tolist()
    for lo, hi in [(keys[1000], keys[1500] + 1), (keys[-3], (1 << 31)), (1, 2), (keys[5000], keys[5000])]:
        mine = scan._collect_on_gpu(shards, lo, hi, 9_334)
        theirs = scan._collect_in_torch(shards, magnitude, lo, hi, 9_334)
        assert mine[:2] == theirs[:2]
        assert sorted_keys(mine[2]) == sorted_keys(theirs[2])
    *counts, inside = scan._collect_on_gpu(shards, keys[0], keys[-1], 100)
    assert counts == [0, len(keys) - keys.count(keys[-1])]
    assert isinstance(inside, scan.Streamed)


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16"])
def test_the_kernels_prune_what_the_cpu_prunes(kernels, monkeypatch, kind):
    mine, theirs = make_shards(kind), make_shards(kind)
    for num_pruned in (1, 3_000, 7_001, 9_333):
        select.prune_smallest_(theirs, num_pruned)
        with monkeypatch.context() as patched:
            patched.setattr(scan, "kernels", lambda: kernels)
            patched.setattr(
                select, "collect", lambda shards, _, lo, hi, limit: scan._collect_on_gpu(shards, lo, hi, limit)
            )
            patched.setattr(
                select,
                "keep_above_",
                lambda shard, _, key: kernels.keep_above_(shard.values, shard.mask, key),
            )
            select.prune_smallest_(mine, num_pruned)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.mask, b.mask)
            a.values.masked_fill_(~a.mask, 0)
            b.values.masked_fill_(~b.mask, 0)
