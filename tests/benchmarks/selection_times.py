"""The bodies of `tests.benchmarks.selection`: seconds and memory of selections and events, in one process and on ranks."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sparsity import Geometric, SparsityCallback
from sparsity.mask import make_shards
from sparsity.select import prune_smallest_
from sparsity.shards import ParameterShard, rank_layout
from tests.benchmarks.common import clock, clock_alone, peak_beyond
from tests.benchmarks.peers import (
    BASELINES,
    COMPILED,
    FLOOR,
    REFERENCE,
    check_same,
    compiled_passes,
    make_weights,
    read_pass,
)

MODULE = "tests.benchmarks.selection_times"
OURS = "prune_smallest_"
SLOW_SECONDS = 5.0


def time_one_process(
    numel: int, sparsity: float, rounds: int, device: str, dtype: str, threads: int, baselines: list[str]
) -> dict[str, float]:
    """Return each method's best seconds on the same weights, after a warm-up on a few; masks are compared every round."""
    torch.set_num_threads(threads)
    timed = clock_alone if threads == 1 else clock
    seconds: dict[str, list[float]] = {}
    for weights in (
        make_weights(max(1000, numel // 100), device, dtype),
        *[make_weights(numel, device, dtype)] * rounds,
    ):
        num_pruned = round(sparsity * sum(weight.numel() for weight in weights))
        shards = make_shards({str(index): weight for index, weight in enumerate(weights)})
        taken, threshold = timed(partial(prune_smallest_, shards, num_pruned), device)
        ours = [shard.mask for shard in shards]
        assert sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in ours) == num_pruned
        seconds.setdefault(OURS, []).append(taken)
        seconds.setdefault(FLOOR, []).append(read_pass(weights, device, timed))
        ties = {threshold.num_below, num_pruned, threshold.num_below + threshold.num_ties}
        for name in baselines:
            if is_slow(seconds.get(name, [])):
                continue
            if name == COMPILED:
                seconds.setdefault(name, []).append(compiled_passes(weights, threshold, timed))
                continue
            taken, theirs = timed(partial(BASELINES[name], weights, num_pruned), device)
            found = check_same(weights, ours, theirs, threshold)
            assert found in ({num_pruned} if name == REFERENCE else ties), f"{name} pruned {found}, we {num_pruned}"
            seconds.setdefault(name, []).append(taken)
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def is_slow(taken: list[float]) -> bool:
    """Return whether the first measurement after the warm-up took so long that one is enough."""
    return len(taken) > 1 and taken[-1] > SLOW_SECONDS


def time_event(numel: int, sparsity: float, rounds: int, device: str) -> dict[str, float]:
    """Return the best seconds of a whole event of the callback, with moments, and of one read pass over the weights."""
    torch.set_num_threads(1)
    weights = make_weights(numel, device)
    model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in weights)
    for layer, weight in zip(model, weights, strict=True):
        layer.weight = nn.Parameter(weight.view(len(weight), -1))
    optimizer = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        optimizer.state[param] = {"exp_avg": torch.ones_like(param), "exp_avg_sq": torch.ones_like(param)}
    callback = SparsityCallback(Geometric(sparsity, 0, 0, 1), report=False)
    callback.bind(model)
    densities = [1 - sparsity * event / (rounds + 1) for event in range(1, rounds + 2)]
    taken = [clock_alone(partial(callback.pruner.prune, density, optimizer), device)[0] for density in densities]
    return {OURS: min(taken[1:]), FLOOR: read_pass(weights, device)}


def time_ranks(numel: int, sparsity: float, rounds: int, dtype: str, baselines: list[str]) -> dict[str, float]:
    """Time, on one rank, our method on FSDP2's row shards against gathering all scores for a one-process method."""
    num_pruned = round(sparsity * numel)
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *baselines)}
    weights = make_weights(numel, dtype=dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = {str(i): distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for i, w in enumerate(weights)}
    whole = make_shards({str(index): weight for index, weight in enumerate(weights)})
    prune_smallest_(whole, num_pruned)

    def ours() -> list[ParameterShard]:
        prune_smallest_(shards, num_pruned, layout=rank_layout(list(sharded.values())))
        return shards

    def gather(by_sort: bool) -> list[Tensor]:
        local = torch.cat([shard.values.abs() for shard in shards])
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(local.numel()))
        parts = [torch.empty(int(size), dtype=local.dtype) for size in sizes]
        dist.all_gather(parts, local)
        scores = torch.cat(parts)
        threshold = scores.sort().values[num_pruned - 1] if by_sort else scores.kthvalue(num_pruned).values
        return [shard.values.abs() > threshold for shard in shards]

    for _ in range(rounds + 1):
        shards = make_shards(sharded)  # type: ignore[arg-type]
        for name in (OURS, *baselines):
            if is_slow(seconds[name]):
                continue
            body = ours if name == OURS else partial(gather, name == "sort")
            dist.barrier()
            taken, _ = clock(body)
            slowest = torch.tensor(taken, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds[name].append(float(slowest))
        seconds.setdefault(FLOOR, []).append(read_pass([shard.values for shard in shards], "cpu", clock))
        for shard, full in zip(shards, whole, strict=True):
            same = torch.equal(shard.mask, full.mask[shard.offset : shard.offset + shard.mask.numel()])
            assert same, f"{shard.name}: two ranks have another mask than one process"
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def extra_bytes(numel: int, sparsity: float, device: str, dtype: str, baselines: list[str]) -> dict[str, int | None]:
    """Return each method's peak memory beyond weights and our masks, or None if it cannot be measured."""
    torch.set_num_threads(1)
    small, large = make_weights(max(1000, numel // 100), device, dtype), make_weights(numel, device, dtype)
    found = {}
    for name in [OURS, *baselines]:
        # A run on small weights first loads what a method needs only once, such as its code.
        for weights in (small, large):
            num_pruned = round(sparsity * sum(weight.numel() for weight in weights))
            if name == OURS:
                shards = make_shards({str(index): weight for index, weight in enumerate(weights)})
                body = partial(prune_smallest_, shards, num_pruned)
                del shards
            else:
                body = partial(BASELINES[name], weights, num_pruned)
            found[name] = peak_beyond(body, device)
    return found
