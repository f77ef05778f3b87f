"""Kernels that write zeros, hash masks and run whole events, compared with the CPU's operations to the last bit."""

import json
import os
import subprocess
import sys
from functools import cache, partial
from types import ModuleType
from unittest import mock

import pytest
import torch

import sparsity
from sparsity import Geometric, SparsityCallback, devices
from sparsity.mask import mask_hash, zero_all_pruned_, zero_pruned_
from sparsity.score import magnitude
from sparsity.select.torch_passes import TorchPasses
from sparsity.tables import Table
from tests.interpreted_kernels import DEVICE, cases, use_kernels
from tests.kernel_oracles import DTYPES, HostReads, same_bits, shards_on, small_model, tensors_of, zeroed


@pytest.fixture
def launches(monkeypatch):
    return use_kernels(monkeypatch)


@pytest.mark.parametrize("mode", ["store", "change", "rewrite"])
@pytest.mark.parametrize(("kind", "dtype", "offset"), cases())
def test_zeros_replace_what_is_pruned_and_nothing_else_changes(launches, kind, dtype, offset, mode):
    tensors = tensors_of(kind, dtype)
    mine, one_by_one = shards_on(DEVICE, tensors, offset), shards_on(DEVICE, tensors, offset)
    moments = [
        [torch.full_like(s.values, float("nan")), torch.full_like(s.values, -2, dtype=torch.float32)] for s in mine
    ]
    expected = [[zeroed(t, s.mask) for t in (s.values, *few)] for s, few in zip(mine, moments, strict=True)]
    launches.zero_all_([(s.mask, [s.values, *few]) for s, few in zip(mine, moments, strict=True)], mode=mode)
    for shard, alone, few, wanted in zip(mine, one_by_one, moments, expected, strict=True):
        launches.zero_(alone.values, alone.mask, mode=mode)
        for found, right in zip([shard.values, *few, alone.values], [*wanted, wanted[0]], strict=True):
            assert same_bits(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_event_on_kernels_is_the_cpus_to_the_last_bit(launches, monkeypatch, dtype):
    shapes = ((24, 40), (1, 8), (64, 40), (24, 104))
    (mine, of_mine), (theirs, of_theirs) = (small_model(dtype, device, shapes) for device in (DEVICE, "cpu"))
    events = [SparsityCallback(Geometric(0.8, 0, 0, 1), report=False) for _ in range(2)]
    events[0].bind(mine)
    events[1].bind(theirs)
    for density in (0.9, 0.2):
        with monkeypatch.context() as patched:
            patched.setattr(devices, "_is_gpu", lambda device: False)
            events[1].pruner.prune(density, of_theirs)
        events[0].pruner.prune(density, of_mine)
        assert events[0].kept == events[1].kept
        assert events[0].threshold == events[1].threshold
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert same_bits(a, b)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert same_bits(of_mine.state[a][moment], of_theirs.state[b][moment])


def test_masks_of_replicas_that_differ_in_one_weight_have_other_hashes(launches):
    mine = shards_on(DEVICE, tensors_of("normal", "float32", (5_000, 3, 0, 4_096)), offset=1)
    hashes = [mask_hash(mine)]
    for number, index in ((0, 0), (0, 4_999), (1, 2), (3, 0), (3, 4_095)):
        mine[number].mask[index] ^= True
        hashes.append(mask_hash(mine))
        mine[number].mask[index] ^= True
    assert mask_hash(mine) == hashes[0]
    assert len(set(hashes)) == 6


def test_a_gradients_pruned_nan_vanishes_and_kept_values_stay(launches):
    gradient = torch.tensor([[-1.0, float("nan"), 2.0], [float("inf"), -0.0, float("nan")]], device=DEVICE)
    mask = torch.tensor([True, False, False, False, True, True], device=DEVICE)
    zero_pruned_(gradient, mask)
    assert same_bits(gradient, torch.tensor([[-1.0, 0.0, 0.0], [0.0, -0.0, float("nan")]]))


def test_where_triton_cannot_run_masks_take_torchs_operations_with_a_warning(monkeypatch):
    broken = ModuleType("sparsity.launches")
    broken.zero_ = mock.Mock(side_effect=RuntimeError("Failed to find C compiler"))
    monkeypatch.setitem(sys.modules, "sparsity.launches", broken)
    monkeypatch.setattr(sparsity, "launches", broken, raising=False)
    monkeypatch.setattr(devices, "_is_gpu", lambda device: True)
    monkeypatch.setattr(devices, "_launches", cache(devices._launches.__wrapped__))
    with pytest.warns(UserWarning, match="Triton cannot run here.*: Failed to find C compiler"):
        assert devices.kernels_for(torch.device("cpu")) is None
    gradient = torch.tensor([1.0, float("nan")])
    zero_pruned_(gradient, torch.tensor([True, False]))
    assert gradient.tolist() == [1.0, 0.0]


def test_what_kernels_do_not_take_is_zeroed_all_the_same(launches):
    mask = torch.arange(12, device=DEVICE) % 5 != 0
    values = torch.arange(1.0, 13.0, device=DEVICE).view(3, 4)
    tensors = [values.double(), values.clone(), values.t().contiguous().t()]
    zero_all_pruned_([(mask, tensors)])
    for tensor in tensors:
        assert torch.equal(tensor, (values * mask.view(3, 4)).to(tensor.dtype))


def host_reads(launches, monkeypatch, body) -> list[str]:
    """Return what the host reads from the device during a call; reads by the interpreter do not count."""
    reads = HostReads()

    def paused(original):
        def run(*args, **kwargs):
            reads.is_paused = True
            try:
                return original(*args, **kwargs)
            finally:
                reads.is_paused = False

        return run

    with monkeypatch.context() as patched, reads:
        patched.setattr(Table, "launch", paused(Table.launch))
        body()
    return reads.found


@pytest.mark.parametrize(("dtype", "most"), [("float32", 4), ("bfloat16", 8)])
def test_the_host_waits_as_often_in_an_event_of_many_parameters_as_in_one_of_few(launches, monkeypatch, dtype, most):
    for num_layers in (2, 20):
        model, optimizer = small_model(dtype, DEVICE, ((40, 50),) * num_layers)
        event = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
        event.bind(model)
        for density in (0.9, 0.5):
            reads = host_reads(launches, monkeypatch, partial(event.pruner.prune, density, optimizer))
            assert 3 <= len(reads) <= most


def test_a_pass_in_torch_waits_once_for_all_its_chunks(monkeypatch):
    mine = shards_on(DEVICE, tensors_of("ties", "float32"))
    with HostReads() as reads:
        passes = TorchPasses(mine, magnitude)
        passes.collect(1_000, 1 << 30, 10_000)
        passes.keep_after_ties_(0, 1_048_576_000, 5)
    assert reads.found == ["tolist"]


def test_every_kernel_compiles_for_compute_capability_9_0_without_a_device():
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["kernel"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert len(found) > 40
    for name in ("collect", "count_bins", "keep_above"):
        for dtype in DTYPES:
            assert found[f"{name}, {dtype}, aligned"]["accesses"]["ld.global.v4.b32"] >= 2
            assert "ld.global.v4.b32" not in found[f"{name}, {dtype}, unaligned"]["accesses"]
    for chunks in (2, 7):
        accesses = found[f"multiply, bf16, {chunks} chunks, bytes"]["accesses"]
        # A warp reads a chunk in two steps: 8 values of 2 bytes, and 8 distances and 8 bases of a byte, for each lane.
        assert sum(count for name, count in accesses.items() if name.endswith("v4.b32")) == 2
        assert sum(count for name, count in accesses.items() if name.endswith("evict_first.L2::cache_hint.v2.b32")) == 2
        assert accesses["ld.global.v2.b32"] == 2
    assert all("LOCAL:0" in row["usage"] and "STACK:0" in row["usage"] for row in found.values())
