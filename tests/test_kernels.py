"""Kernels compared with numpy on CPU copies: in Triton's interpreter, or on a GPU if there is one."""

import ast
import importlib
import json
import os
import subprocess
import sys
from functools import cache, partial
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

import sparsity
from sparsity import Geometric, SparsityCallback, devices
from sparsity.mask import mask_hash, zero_all_pruned_, zero_pruned_
from sparsity.score import magnitude
from sparsity.select import prune_smallest_, search
from sparsity.select.inside import Tagged
from sparsity.select.torch_passes import TorchPasses
from sparsity.select.triton_passes import TritonPasses, radix_select
from sparsity.tables import Shape, Table
from tests.commands import ROOT
from tests.kernel_oracles import (
    DTYPES,
    KINDS,
    HostReads,
    keys_of,
    same_bits,
    shards_on,
    small_model,
    tensors_of,
    zeroed,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch):
    """Make every pass on `DEVICE` use the kernels, and return the module that launches them."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for GPUs")
    if DEVICE == "cpu":
        monkeypatch.setattr(devices, "_is_gpu", lambda device: True)
        monkeypatch.setattr(devices, "_launches", lambda device: interpreted_launches())
    return devices.kernels_for(torch.device(DEVICE))


@cache
def interpreted_launches() -> ModuleType:
    """Return `sparsity.launches` on Triton's interpreter.

    Triton chooses the interpreter when it is imported, so this imports Triton again, and then restores the first one.
    """
    ours = ("sparsity.kernels", "sparsity.zero_kernels", "sparsity.launches")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "triton" or name in ours}
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for name in before:
            if not name.startswith("triton._C"):
                del sys.modules[name]
        # If they stayed attributes of the package, they would be found without an import.
        for name in ("kernels", "zero_kernels", "launches"):
            vars(sparsity).pop(name, None)
        found = importlib.import_module("sparsity.launches")
    sys.modules.update(before)
    return found


def cases() -> list[tuple[str, str, int]]:
    """Return (kind, type, storage offset) to test: all on a GPU, a few in the interpreter, which is slow.

    An offset of 3 elements is no multiple of 16 bytes.
    """
    if DEVICE == "cuda":
        return [(kind, dtype, offset) for kind in KINDS for dtype in DTYPES for offset in (0, 3)]
    return [
        ("normal", "float32", 3), ("normal", "bfloat16", 0), ("ties", "bfloat16", 3), ("denormal", "float32", 0),
        ("denormal", "float16", 0), ("mostly zeros", "float32", 0), ("mixed", "float16", 0),
    ]  # fmt: skip


def ranges(tensors) -> list[tuple[int, int]]:
    """Return ranges of keys: narrow, at the end with NaN and infinities, empty, only zero, and all."""
    keys = np.sort(np.concatenate([keys_of(tensor) for tensor in tensors])).tolist()
    return [
        (keys[1000], keys[2500] + 1), (keys[-5], 1 << 31), (keys[5000], keys[5000]), (0, 1), (0, 1 << 31),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "offset"), cases())
def test_collected_keys_are_those_of_the_range_with_their_shards(launches, monkeypatch, kind, dtype, offset):
    monkeypatch.setattr(launches, "LEAST_ROOM", 10_000)
    tensors = tensors_of(kind, dtype)
    mine, keys = shards_on(DEVICE, tensors, offset), [keys_of(tensor) for tensor in tensors]
    for lo, hi in ranges(tensors):
        below, inside = sum(int((k < lo).sum()) for k in keys), [np.sort(k[(k >= lo) & (k < hi)]) for k in keys]
        num_inside = sum(map(len, inside))
        counts, found, owners = launches.collect(mine, lo, hi, 10_000)
        assert counts.tolist() == [below, num_inside, 0]
        found, owners = found.cpu().numpy(), owners.cpu().numpy()
        found, owners = found[found >= 0], owners[found >= 0]
        assert [np.sort(found[owners == number]).tolist() for number in range(len(tensors))] == [
            k.tolist() for k in inside
        ]
        few = launches.collect(mine, lo, hi, 7)
        assert few[0].tolist() == [below, num_inside, max(0, num_inside - 7)]
        assert len(few[1]) == 7
        assert set(few[1][few[1] >= 0].tolist()) <= set(found.tolist())


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 0), ("bfloat16", 3), ("float16", 0)])
def test_keys_in_many_segments_are_stored_once_and_those_without_room_are_counted(launches, monkeypatch, dtype, offset):
    monkeypatch.setattr(launches, "LEAST_ROOM", 500)
    tensors = tensors_of("normal", dtype, (30_000, 5, 0, 9_000, 16_384))
    mine, keys = shards_on(DEVICE, tensors, offset), [keys_of(tensor) for tensor in tensors]
    lo, hi = 1 << 29, int(np.quantile(np.concatenate(keys), 0.1))
    inside = [k[(k >= lo) & (k < hi)] for k in keys]
    num_inside = sum(map(len, inside))
    shape = Shape(1 << 10, 1)
    for limit, has_room in ((20_000, True), (1_000, False)):
        counts, found, owners = launches.collect(mine, lo, hi, limit, shape)
        assert counts[:2].tolist() == [sum(int((k < lo).sum()) for k in keys), num_inside]
        found, owners = found.cpu().numpy(), owners.cpu().numpy()
        assert int((found >= 0).sum()) + int(counts[2]) == num_inside
        assert (int(counts[2]) == 0) == has_room
        for number, expected in enumerate(inside):
            stored = found[(owners == number) & (found >= 0)]
            if has_room:
                assert sorted(stored.tolist()) == sorted(expected.tolist())
            else:
                assert set(stored.tolist()) <= set(expected.tolist())


@pytest.mark.parametrize(("kind", "dtype", "offset"), cases())
def test_bins_hold_what_numpy_counts(launches, kind, dtype, offset):
    tensors = tensors_of(kind, dtype)
    mine, keys = shards_on(DEVICE, tensors, offset), [keys_of(tensor) for tensor in tensors]
    for lo, hi in ranges(tensors):
        if hi == lo:
            continue
        shift = max(0, (hi - lo - 1).bit_length() - 6)
        num_bins = ((hi - lo - 1) >> shift) + 1
        expected = [np.bincount((k[(k >= lo) & (k < hi)] - lo) >> shift, minlength=num_bins) for k in keys]
        below, by_shard = launches.count_by_shard(mine, lo, hi, shift)
        assert below.tolist() == [sum(int((k < lo).sum()) for k in keys)]
        assert by_shard.tolist() == [e.tolist() for e in expected]
        total = launches.histogram_of_shards(mine, lo, hi, shift)
        assert total.dtype == torch.int64
        assert total.tolist() == sum(expected).tolist()
        joined = torch.from_numpy(np.concatenate(keys).astype(np.int32)).to(DEVICE)
        assert launches.histogram_of_keys(joined, lo, hi, shift).tolist() == sum(expected).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "denormal"])
def test_digits_of_several_ranks_end_at_the_keys_of_a_sort(launches, kind, dtype):
    ordered = np.sort(np.concatenate([keys_of(tensor) for tensor in tensors_of(kind, dtype)]))
    shuffled = np.random.default_rng(0).permutation(np.append(ordered, [-1] * 100)).astype(np.int32)
    keys, spacing_bits = torch.from_numpy(shuffled).to(DEVICE), 16 if dtype == "bfloat16" else 0
    for first, last in ((0, len(ordered) - 1), (1_000, 7_000), (5_000, 5_000)):
        lo, hi = int(ordered[first]), int(ordered[last]) + 1
        inside = ordered[(ordered >= lo) & (ordered < hi)]
        for rank in (1, len(inside) // 2 + 1, len(inside)):
            ranks = torch.tensor([rank, len(inside)], device=DEVICE)
            found, shift = radix_select(launches, keys, lo, hi, ranks, spacing_bits)
            assert shift == spacing_bits
            for one, (offset, below, held) in zip((rank, len(inside)), found.tolist(), strict=True):
                key = int(inside[one - 1])
                assert lo + (offset << spacing_bits) == key
                assert (below, held) == (int((inside < key).sum()), int((inside == key).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bracket_holds_the_keys_of_both_ranks_and_little_more(launches, dtype):
    ordered = np.sort(np.concatenate([keys_of(tensor) for tensor in tensors_of("normal", dtype)]))
    keys, spacing_bits = torch.from_numpy(ordered.astype(np.int32)).to(DEVICE), 16 if dtype == "bfloat16" else 0
    for first, last in ((1, 1), (4_000, 4_100), (9_000, len(ordered))):
        passes = TritonPasses(shards_on(DEVICE, tensors_of("normal", dtype)), magnitude, launches)
        (lo, hi), below, num_inside = passes.find_bracket(keys, (first, last))
        assert lo <= ordered[first - 1] <= ordered[last - 1] < hi
        assert lo % (1 << spacing_bits) == hi % (1 << spacing_bits) == 0
        assert below == int((ordered < lo).sum())
        assert num_inside == int(((ordered >= lo) & (ordered < hi)).sum())
        tight = int(((ordered >= ordered[first - 1]) & (ordered <= ordered[last - 1])).sum())
        assert num_inside <= tight + 40 or dtype != "float32"


def test_a_range_without_the_key_and_a_buffer_too_small_are_told(launches):
    tensors = [torch.arange(1.0, 10_001.0)]
    mine = shards_on(DEVICE, tensors)
    lo, hi = (int(key) for key in keys_of(torch.tensor([1_000.0, 3_000.0])))
    passes = TritonPasses(mine, magnitude, launches)
    found = passes.collect_and_find(2_000, lo, hi, 4_000)
    assert found[:3] == (999, 2_000, (int(keys_of(torch.tensor([2_000.0]))[0]), 1_999, 1))
    assert isinstance(found[3], Tagged)
    for k in (999, 3_000):
        assert passes.collect_and_find(k, lo, hi, 4_000)[:3] == (999, 2_000, None)
    below, num_inside, key, inside = passes.collect_and_find(2_000, lo, hi, 1_500)
    assert (below, num_inside, key) == (999, 2_000, None)
    assert inside is passes


@pytest.mark.parametrize(("kind", "dtype", "offset"), cases())
def test_masks_keep_keys_above_a_bound_of_each_shard(launches, kind, dtype, offset):
    tensors = tensors_of(kind, dtype)
    mine, keys = shards_on(DEVICE, tensors, offset), [keys_of(tensor) for tensor in tensors]
    bounds = [int(np.sort(k)[len(k) // 2]) - number % 2 if len(k) else 5 for number, k in enumerate(keys)]
    launches.keep_above_(mine, bounds)
    for shard, key, bound in zip(mine, keys, bounds, strict=True):
        assert shard.mask.tolist() == (key > bound).tolist()
    assert launches.count_kept(mine).tolist() == [int((k > b).sum()) for k, b in zip(keys, bounds, strict=True)]


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_ties_go_and_those_pruned_before_are_none(launches, dtype, offset):
    tensors = tensors_of("ties", dtype)
    for num_dropped in (1, 500, 100_000):
        mine = shards_on(DEVICE, tensors, offset)
        for shard, tensor in zip(mine, tensors, strict=True):
            key = keys_of(torch.tensor([0.25]))[0]
            ties = np.flatnonzero((keys_of(tensor) == key) & shard.mask.cpu().numpy())
            expected = keys_of(tensor) > key
            expected[ties[num_dropped:]] = True
            launches.keep_after_ties_(shard, int(key), num_dropped)
            assert shard.mask.tolist() == expected.tolist()


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sample_is_every_nth_weight(launches, dtype, offset):
    tensors = tensors_of("normal", dtype)
    mine = shards_on(DEVICE, tensors, offset)
    for stride in (7, 4_001):
        expected = keys_of(torch.cat([tensor.float() for tensor in tensors]))[::stride]
        assert TritonPasses(mine, magnitude, launches).sample(stride).tolist() == expected.tolist()


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


@pytest.mark.parametrize(("kind", "dtype", "offset"), cases())
def test_kernels_prune_what_the_cpu_prunes(launches, monkeypatch, kind, dtype, offset):
    tensors = [tensor.nan_to_num(nan=1.0) for tensor in tensors_of(kind, dtype)]
    mine, theirs = shards_on(DEVICE, tensors, offset), shards_on("cpu", tensors)
    for shard in (*mine, *theirs):
        shard.mask.fill_(True)
    for num_pruned in (1, 5_001):
        with monkeypatch.context() as patched:
            patched.setattr(devices, "_is_gpu", lambda device: False)
            threshold = prune_smallest_(theirs, num_pruned)
        assert prune_smallest_(mine, num_pruned) == threshold
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.mask.cpu(), b.mask)
            a.values.masked_fill_(~a.mask, 0)
            b.values.masked_fill_(~b.mask, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_that_misleads_and_too_many_keys_cost_kernels_no_exactness(launches, monkeypatch, dtype):
    monkeypatch.setattr(search, "SAMPLE_SIZE", 64)
    monkeypatch.setattr(search, "SAMPLE_SHARE", 0.0)
    monkeypatch.setattr(search, "SAMPLE_SIGMAS", 0.0)
    monkeypatch.setattr(search, "MIN_CANDIDATES", 10)
    monkeypatch.setattr(search, "CANDIDATE_SHARE", 0.0)
    tensors = [tensor.nan_to_num(nan=1.0) for tensor in tensors_of("ties" if dtype == "float32" else "normal", dtype)]
    magnitudes = torch.cat([tensor.double().abs() for tensor in tensors])
    for num_pruned in (50, 9_000):
        mine = shards_on(DEVICE, tensors)
        for shard in mine:
            shard.mask.fill_(True)
        prune_smallest_(mine, num_pruned)
        expected = torch.ones(len(magnitudes), dtype=torch.bool)
        expected[torch.sort(magnitudes, stable=True).indices[:num_pruned]] = False
        assert torch.equal(torch.cat([shard.mask.cpu() for shard in mine]), expected)


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


def test_a_selection_reads_the_pointers_of_its_shards_once(launches, monkeypatch):
    calls = []
    original = launches.rows_of
    monkeypatch.setattr(launches, "rows_of", lambda shards: calls.append(len(shards)) or original(shards))
    mine = shards_on(DEVICE, tensors_of("normal", "float32"))
    prune_smallest_(mine, 3_000)
    assert calls == [5]


def test_a_pass_in_torch_waits_once_for_all_its_chunks(monkeypatch):
    mine = shards_on(DEVICE, tensors_of("ties", "float32"))
    with HostReads() as reads:
        passes = TorchPasses(mine, magnitude)
        passes.collect(1_000, 1 << 30, 10_000)
        passes.keep_after_ties_(0, 1_048_576_000, 5)
    assert reads.found == ["tolist"]


def test_no_number_that_differs_between_events_is_a_constant_of_a_kernel():
    """Triton compiles a kernel anew for a 1 or a multiple of 16, unless do_not_specialize names the argument."""
    numbers = {
        "lo", "last", "key", "shift", "stride", "room", "numel", "num_segments", "num_bins", "num_bits", "num_copies",
        "num_dropped",
    }  # fmt: skip
    found = {}
    for name in ("kernels", "zero_kernels"):
        for node in ast.parse((ROOT / "sparsity" / f"{name}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                named = {
                    constant.value
                    for constant in ast.walk(node.decorator_list[0])
                    if isinstance(constant, ast.Constant)
                }
                found[node.name] = {arg.arg for arg in node.args.args} & numbers - named
    assert {"collect", "count_bins", "count_digits", "sample", "keep_after_ties", "zero_one"} <= found.keys()
    assert not any(found.values()), found


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
