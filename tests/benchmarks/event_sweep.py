"""A sweep over block sizes and numbers of warps for the kernels of a prune event."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sparsity import devices
from sparsity.mask import make_shards
from sparsity.select import prune_smallest_
from sparsity.tables import Shape
from tests.benchmarks.event_model import SPARSITY, Model, best

SWEPT = {
    "collect": ((4096, 4), (8192, 4), (8192, 8)),
    "keep_above_": ((2048, 4), (8192, 8), (16384, 4)),
    "count_kept": ((8192, 8), (16384, 4), (16384, 8)),
    "zero_all_ change": ((1024, 4), (2048, 4), (2048, 8)),
    "gradients rewrite": ((1024, 8), (2048, 8)),
    "gradients store": ((4096, 4),),
}
"""The blocks and warps to try for each pass, with a compilation each; zeros are written in the ways fastest on an H200."""
REHEARSED = dict.fromkeys(SWEPT, ((4096, 8),))


Shapes = dict[str, tuple[tuple[int, int], ...]]


def sweep(model: Model, device: str, shapes: Shapes) -> dict[str, dict[str, float]]:
    """Time each large pass with several blocks and warps, from the same state each time."""
    launches = devices.kernels_for(torch.device(device))
    if launches is None:
        return {}
    model.start_anew()
    ours = model.pruner.shards
    model.pruner.prune(0.5)
    threshold = int(torch.tensor(model.pruner.threshold, dtype=torch.float32).view(torch.int32))
    earlier = [shard.mask.clone() for shard in ours]
    later = make_shards({shard.name: shard.values for shard in ours})
    prune_smallest_(later, round(0.54 * model.numel))
    final = make_shards({shard.name: shard.values for shard in ours})
    prune_smallest_(final, round(SPARSITY * model.numel))
    triples = [[w, *model.moments[2 * i : 2 * i + 2]] for i, w in enumerate(model.weights)]

    def as_before() -> None:
        for tensors, mask in zip(triples, earlier, strict=True):
            for tensor in tensors:
                tensor.fill_(1.0)
                torch.where(mask.view(tensor.shape), tensor, tensor.new_zeros(()), out=tensor)

    def as_gradients() -> None:
        for tensors in triples:
            tensors[1].fill_(1.0)

    limit = model.numel // 100 + 4096
    lo, hi = threshold, threshold + (1 << 15)
    bodies: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
        "collect": (partial(launches.collect, ours, lo, hi, limit), lambda: None),
        "keep_above_": (partial(launches.keep_above_, ours, [threshold] * len(ours)), lambda: None),
        "count_kept": (partial(launches.count_kept, ours), lambda: None),
    }
    masked = [(shard.mask, tensors) for shard, tensors in zip(later, triples, strict=True)]

    def gradients(mode: str, **options: Any) -> None:
        for tensors, shard in zip(triples, final, strict=True):
            launches.zero_(tensors[1], shard.mask, mode=mode, **options)

    for name in shapes:
        kind, _, mode = name.partition(" ")
        if kind == "zero_all_":
            bodies[name] = partial(launches.zero_all_, masked, mode=mode), as_before
        elif kind == "gradients":
            bodies[name] = partial(gradients, mode), as_gradients
    found: dict[str, dict[str, float]] = {}
    for name, (body, before) in bodies.items():
        if name == "zero_all_ change":
            # These passes change weights, so they come after those that read them.
            print("sweeping what writes zeros", file=sys.stderr, flush=True)
        found[name] = {
            f"{block} x {num_warps} warps": best(partial(body, shape=Shape(block, num_warps)), device, before, rounds=2)
            for block, num_warps in shapes[name]
        }
        fastest = min(found[name], key=found[name].__getitem__)
        print(f"best {name:<18} {fastest:<18} {found[name][fastest] * 1000:8.3f} ms", flush=True)
    found["gradients torch.where"] = {
        "": best(
            lambda: [
                torch.where(s.mask.view(t[1].shape), t[1], t[1].new_zeros(()), out=t[1])
                for t, s in zip(triples, final, strict=True)
            ],
            device, as_gradients, rounds=2,
        )
    }  # fmt: skip
    return found
