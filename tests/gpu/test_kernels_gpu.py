"""Kernels on a GPU at the size of a model, against numpy on the CPU; the compilations and host syncs of an event."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sparsity import Geometric, SparsityCallback
from sparsity.mask import count_mask
from sparsity.select import prune_smallest_
from tests.kernel_oracles import DTYPES, keys_of, same_bits, shards_on, small_model, tensors_of, zeroed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = (3_000_001, *[600_000] * 44, 1, 0, 131_072, 777_777, 4)
"""About 30 million weights in 50 shards."""
SHAPES = ((512, 512),) * 4 + ((1536, 512),) * 2 + ((512, 1536), (1000, 512), (1, 8), (7, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_thirty_million_weights_are_pruned_as_numpy_sorts_them(dtype):
    tensors = [tensor.nan_to_num(nan=1.0) for tensor in tensors_of("normal", dtype, SIZES)]
    shards = shards_on("cuda", tensors)
    for shard in shards:
        shard.mask.fill_(True)
    keys = np.concatenate([keys_of(tensor) for tensor in tensors])
    for num_pruned in (5, len(keys) // 3, len(keys) // 2, len(keys) - 5):
        threshold = prune_smallest_(shards, num_pruned)
        limit = int(np.partition(keys, num_pruned - 1)[num_pruned - 1])
        expected = keys > limit
        ties = np.flatnonzero(keys == limit)
        expected[ties[num_pruned - int((keys < limit).sum()) :]] = True
        assert threshold.key == limit
        assert np.array_equal(torch.cat([shard.mask for shard in shards]).cpu().numpy(), expected)
        assert count_mask(shards).tolist() == [int(shard.mask.sum()) for shard in shards]


def test_an_event_takes_little_memory_beside_the_model():
    model, optimizer = small_model("float32", "cuda", ((4096, 4096), (4096, 8192)))
    event = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    event.bind(model)
    for density in (0.9, 0.5):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        event.pruner.prune(density, optimizer)
        taken = torch.cuda.max_memory_allocated() - before
        assert taken < 0.05 * 4 * 50_331_648, f"{taken:,} bytes more"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3])
def test_zeros_are_written_where_numpy_writes_them_and_nowhere_else(dtype, offset):
    from sparsity import launches

    tensors = tensors_of("normal", dtype, (4_000_003, 1, 0, 333))
    for mode in ("store", "change", "rewrite"):
        shards, alone = shards_on("cuda", tensors, offset), shards_on("cuda", tensors, offset)
        launches.zero_all_([(shard.mask, [shard.values]) for shard in shards], mode=mode)
        for shard, one in zip(shards, alone, strict=True):
            expected = zeroed(one.values, one.mask)
            launches.zero_(one.values, one.mask, mode=mode)
            assert same_bits(shard.values, expected)
            assert same_bits(one.values, expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_events_of_a_model_are_those_of_the_cpu_to_the_last_bit(dtype, pattern):
    shapes = SHAPES[:8] if pattern == "2:4" else SHAPES
    (mine, of_mine), (theirs, of_theirs) = (small_model(dtype, device, shapes) for device in ("cuda", "cpu"))
    ends = 0.5 if pattern == "2:4" else 0.8
    events = [SparsityCallback(Geometric(ends, 0, 0, 1), pattern=pattern, report=False) for _ in range(2)]
    for event, model in zip(events, (mine, theirs), strict=True):
        event.bind(model)
    for density in (0.93, 0.5) if pattern == "2:4" else (0.93, 0.5, 0.2):
        events[0].pruner.prune(density, of_mine)
        events[1].pruner.prune(density, of_theirs)
        assert events[0].kept == events[1].kept
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert same_bits(a, b)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert same_bits(of_mine.state[a][moment], of_theirs.state[b][moment])


def test_a_backward_pass_leaves_no_pruned_gradient_and_no_nan():
    layer = nn.Linear(513, 257, bias=False).cuda()
    event = SparsityCallback(Geometric(0.5, 0, 0, 1), report=False)
    event.bind(layer)
    event.pruner.prune(0.5)
    mask = event.shards[0].mask.view(257, 513)
    inputs = torch.randn(8, 513, device="cuda")
    inputs[:, 0] = float("inf")
    layer(inputs).sum().backward()
    expected = zeroed(inputs.sum(0).expand(257, 513), mask)
    torch.testing.assert_close(layer.weight.grad.cpu(), expected)
    assert bool((layer.weight.grad[~mask] == 0).all())


def events_of(
    num_layers: int, dtype: str, shape: tuple[int, int] = (256, 384)
) -> tuple[SparsityCallback, torch.optim.Optimizer]:
    model, optimizer = small_model(dtype, "cuda", (shape,) * num_layers)
    event = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    event.bind(model)
    return event, optimizer


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_densities_sizes_and_models_compile_nothing_anew(dtype):
    from sparsity import kernels, zero_kernels

    names = (
        "collect", "count_bins", "count_digits", "sample", "keep_above", "count_ties", "keep_after_ties", "count_kept",
    )  # fmt: skip
    all_kernels = [zero_kernels.zero, *(getattr(kernels, name) for name in names)]

    def num_compiled() -> int:
        return sum(len(held[0]) for kernel in all_kernels for held in kernel.device_caches.values())

    event, optimizer = events_of(10, dtype)
    for density in (0.95, 0.9, 0.8, 0.5, 0.2):
        event.pruner.prune(density, optimizer)
    before = num_compiled()
    assert before > 0
    other, of_other = events_of(17, dtype, (255, 383))
    for density in (0.93, 0.7, 0.61, 0.3, 0.21):
        other.pruner.prune(density, of_other)
    assert num_compiled() == before


@pytest.mark.parametrize(("dtype", "most"), [("float32", 5), ("bfloat16", 10), ("float16", 10)])
def test_the_host_waits_a_few_times_an_event_whatever_the_number_of_parameters(dtype, most):
    for num_layers in (2, 40):
        event, optimizer = events_of(num_layers, dtype)
        event.pruner.prune(0.95, optimizer)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                event.pruner.prune(0.5, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
        assert 1 <= len(waits) <= most, [str(warning.message) for warning in waits]
