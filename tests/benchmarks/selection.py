"""Global magnitude pruning: our selection and masks against what torch offers, exactness checked on the way.

    python -m tests.benchmarks.selection [--numel 50000000] [--sparsity 0.8] [--rounds 3]   -> runs/bench/selection.json

Every process computes with one thread. The methods of one process take turns in it and the best round of each counts;
extra memory (the peak beyond weights and masks) comes from a process of its own, because the settings of malloc that
make it exact cost time. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import prune

from sparsity.mask import make_shards
from sparsity.score import magnitude_of_key
from sparsity.select import Threshold, prune_smallest_
from sparsity.shards import ParameterShard, rank_layout
from tests.benchmarks.common import (
    EXACT_MEMORY,
    RESULTS,
    Comparison,
    clock,
    finish,
    in_process,
    machine,
    peak_beyond,
    publish,
)
from tests.distributed import run_ranks

MODULE = "tests.benchmarks.selection"
LEAST_SPEEDUP = 15.0
MOST_EXTRA_BYTES = 64 << 20
OURS, REFERENCE = "prune_smallest_", "global_unstructured"
Method = Callable[[list[Tensor], int], list[Tensor]]
"""Masks of the weights, True where kept, with that many pruned."""


def make_weights(numel: int, device: str = "cpu") -> list[Tensor]:
    """Weights of a LLaMA's linear layers, `numel` in all; the head and a rest fill up what whole layers leave."""
    hidden = next((width for width in (400, 40) if numel >= 32 * width**2), 4)
    layer = [(hidden, hidden)] * 4 + [(4 * hidden, hidden)] * 2 + [(hidden, 4 * hidden)]
    num_layers = numel // (16 * hidden**2)
    rows, rest = divmod(numel - num_layers * 16 * hidden**2, hidden)
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in [*layer * num_layers, (rows, hidden), (rest,)] if 0 not in shape]
    return [torch.randn(shape, generator=generator).mul_(0.02).to(device) for shape in shapes]


def by_global_unstructured(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    modules = [nn.Module() for _ in weights]
    for module, weight in zip(modules, weights, strict=True):
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    chosen = [(module, "weight") for module in modules]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=num_pruned)
    return [module.weight_mask for module in modules]  # type: ignore[misc]


def by_topk(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    """In topk's quickest form: the smaller side, not sorted."""
    scores = torch.cat([weight.abs().view(-1) for weight in weights])
    threshold = torch.topk(scores, scores.numel() - num_pruned, sorted=False).values.min()
    return [weight.abs() >= threshold for weight in weights]


def by_kthvalue(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    scores = torch.cat([weight.abs().view(-1) for weight in weights])
    threshold = scores.kthvalue(num_pruned).values
    return [weight.abs() > threshold for weight in weights]


BASELINES: dict[str, Method] = {REFERENCE: by_global_unstructured, "topk": by_topk, "kthvalue": by_kthvalue}


def check_same(weights: list[Tensor], ours: list[Tensor], theirs: list[Tensor], threshold: Threshold) -> int:
    """The number that they prune; an AssertionError where a mask differs other than in ties at the threshold."""
    tie = magnitude_of_key(threshold.key)
    for weight, mask, other in zip(weights, ours, theirs, strict=True):
        differ = mask.view(-1) != other.bool().view(-1)
        assert bool((weight.view(-1)[differ].abs() == tie).all()), "a mask differs outside ties"
    return sum(other.numel() - int(torch.count_nonzero(other)) for other in theirs)


def time_one_process(numel: int, sparsity: float, rounds: int, device: str) -> dict[str, float]:
    """Best seconds of each method on the same weights, after a warm-up on a few; masks are compared in each round."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    for weights in (make_weights(max(1000, numel // 100), device), *[make_weights(numel, device)] * rounds):
        num_pruned = round(sparsity * sum(weight.numel() for weight in weights))
        shards = make_shards({str(index): weight for index, weight in enumerate(weights)})
        taken, threshold = clock(partial(prune_smallest_, shards, num_pruned), device)
        ours = [shard.mask for shard in shards]
        assert check_same(weights, ours, ours, threshold) == num_pruned
        seconds.setdefault(OURS, []).append(taken)
        ties = {threshold.num_below, num_pruned, threshold.num_below + threshold.num_ties}
        for name, method in BASELINES.items():
            taken, theirs = clock(partial(method, weights, num_pruned), device)
            found = check_same(weights, ours, theirs, threshold)
            assert found in ({num_pruned} if name == REFERENCE else ties), f"{name} pruned {found}, we {num_pruned}"
            seconds.setdefault(name, []).append(taken)
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def time_ranks(numel: int, sparsity: float, rounds: int) -> dict[str, float]:
    """The body of a rank: row shards as FSDP2 makes them, ours against gathering all scores for kthvalue."""
    num_pruned, seconds = round(sparsity * numel), {OURS: [], "gather + kthvalue": []}
    weights = make_weights(numel)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = {str(i): distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for i, w in enumerate(weights)}
    whole = make_shards({str(index): weight for index, weight in enumerate(weights)})
    prune_smallest_(whole, num_pruned)

    def ours() -> list[ParameterShard]:
        prune_smallest_(shards, num_pruned, layout=rank_layout(list(sharded.values())))
        return shards

    def gather() -> float:
        local = torch.cat([shard.values.abs() for shard in shards])
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor(local.numel()))
        parts = [torch.empty(int(size)) for size in sizes]
        dist.all_gather(parts, local)
        threshold = torch.cat(parts).kthvalue(num_pruned).values
        return [shard.values.abs() > threshold for shard in shards]  # type: ignore[return-value]

    for _ in range(rounds + 1):
        shards = make_shards(sharded)  # type: ignore[arg-type]
        for name, body in ((OURS, ours), ("gather + kthvalue", gather)):
            dist.barrier()
            taken, _ = clock(body)
            slowest = torch.tensor(taken, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds[name].append(float(slowest))
        for shard, full in zip(shards, whole, strict=True):
            same = torch.equal(shard.mask, full.mask[shard.offset : shard.offset + shard.mask.numel()])
            assert same, f"{shard.name}: two ranks have another mask than one process"
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def extra_bytes(numel: int, sparsity: float, device: str) -> dict[str, int | None]:
    """Each method's peak memory beyond weights and our masks; None where it cannot be measured."""
    torch.set_num_threads(1)
    found = {}
    for weights in (make_weights(max(1000, numel // 100), device), make_weights(numel, device)):
        num_pruned = round(sparsity * sum(weight.numel() for weight in weights))
        shards = make_shards({str(index): weight for index, weight in enumerate(weights)})
        found[OURS] = peak_beyond(partial(prune_smallest_, shards, num_pruned), device)
        for name, method in BASELINES.items():
            found[name] = peak_beyond(partial(method, weights, num_pruned), device)
    return found


def measure(numel: int, sparsity: float, rounds: int, num_ranks: int = 2) -> list[Comparison]:
    """All comparisons; on a machine with a GPU those of one process there too."""
    where = {"numel": numel, "sparsity": sparsity, "threads": 1, **machine()}
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        seconds = in_process(MODULE, "time_one_process", numel, sparsity, rounds, device)
        extra = in_process(MODULE, "extra_bytes", numel, sparsity, device, **EXACT_MEMORY)
        details = {**where, "device": device, "ranks": 1, "extra_bytes": extra[OURS]}
        for name in BASELINES:
            kept = {**details, "baseline_extra_bytes": extra[name]}
            found.append(Comparison("selection, one process", seconds[OURS], name, seconds[name], kept))
    ranks = run_ranks(time_ranks, num_ranks, numel, sparsity, rounds, timeout_s=600)[0]
    details = {**where, "device": "cpu", "ranks": num_ranks}
    baselines = {
        f"{REFERENCE}, one process": found[0].baseline_seconds,
        "gather + kthvalue": ranks["gather + kthvalue"],
    }
    for name, taken in baselines.items():
        found.append(Comparison(f"selection, {num_ranks} ranks", ranks[OURS], name, taken, details))
    return found


def missed_goals(comparisons: list[Comparison]) -> list[str]:
    """A sentence for each goal that is missed: speed in one CPU process, extra memory on every device."""
    missed = []
    for found in comparisons:
        device, extra = found.details["device"], found.details.get("extra_bytes")
        if found.baseline != REFERENCE:
            continue
        if device == "cpu" and found.ratio < LEAST_SPEEDUP:
            missed.append(
                f"Selection is {found.ratio:.1f} times as fast as {REFERENCE}, the goal is {LEAST_SPEEDUP:g}."
            )
        if extra is not None and extra >= MOST_EXTRA_BYTES:
            goal = f"the goal is less than {MOST_EXTRA_BYTES >> 20} MiB"
            missed.append(f"Selection takes {extra / 2**20:.0f} MiB of extra memory on {device}, {goal}.")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "selection.json")
    options = parser.parse_args()
    found = measure(options.numel, options.sparsity, options.rounds)
    publish(found, options.output, ["device", "ranks", "extra_bytes", "baseline_extra_bytes"])
    finish(missed_goals(found))


if __name__ == "__main__":
    main()
