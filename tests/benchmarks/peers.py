"""Other ways to prune: masks by torch's own operations, a check that they are equal, and the lower bound of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsity.score import SIGN_OFF, magnitude_of_key
from sparsity.select import Threshold
from tests.benchmarks.common import clock_alone

REFERENCE, COMPILED, FLOOR = "global_unstructured", "compiled passes", "one read pass"
Method = Callable[[list[Tensor], int], list[Tensor]]
"""A function that returns masks of the weights, True for kept ones, with the given number pruned."""


def make_weights(numel: int, device: str = "cpu", dtype: str = "float32") -> list[Tensor]:
    """Return `numel` weights in the shapes of a LLaMA's linear layers; a head and a remainder make up the number."""
    hidden = next((width for width in (2048, 400, 40) if numel >= 32 * width**2), 4)
    layer = [(hidden, hidden)] * 4 + [(4 * hidden, hidden)] * 2 + [(hidden, 4 * hidden)]
    num_layers = numel // (16 * hidden**2)
    rows, rest = divmod(numel - num_layers * 16 * hidden**2, hidden)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [shape for shape in [*layer * num_layers, (rows, hidden), (rest,)] if 0 not in shape]
    drawn = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return [weight.mul_(0.02).to(getattr(torch, dtype)) for weight in drawn]


def by_global_unstructured(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    modules = [nn.Module() for _ in weights]
    for module, weight in zip(modules, weights, strict=True):
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    chosen = [(module, "weight") for module in modules]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=num_pruned)
    return [module.weight_mask for module in modules]  # type: ignore[misc]


def by_topk(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    """Return masks by topk in its fastest form: of the smaller side, unsorted."""
    scores = torch.cat([weight.abs().view(-1) for weight in weights])
    threshold = torch.topk(scores, scores.numel() - num_pruned, sorted=False).values.min()
    return [weight.abs() >= threshold for weight in weights]


def by_kthvalue(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    scores = torch.cat([weight.abs().view(-1) for weight in weights])
    threshold = scores.kthvalue(num_pruned).values
    return [weight.abs() > threshold for weight in weights]


def by_sort(weights: list[Tensor], num_pruned: int) -> list[Tensor]:
    scores = torch.cat([weight.abs().view(-1) for weight in weights])
    threshold = torch.sort(scores).values[num_pruned - 1]
    return [weight.abs() > threshold for weight in weights]


BASELINES: dict[str, Method] = {
    REFERENCE: by_global_unstructured,
    "topk": by_topk,
    "kthvalue": by_kthvalue,
    "sort": by_sort,
}


def compiled_passes(weights: list[Tensor], threshold: Threshold, timed: Callable[..., tuple[float, Any]]) -> float:
    """Time the two passes of a selection, counting around a bracket and writing the masks, as compiled kernels.

    They count and write sign bits, because the comparisons that torch.compile makes for a CPU take several times as long.
    """

    @torch.compile(dynamic=True)
    def count(bits: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        keys = (bits & SIGN_OFF).view(-1, 256)
        below, upto = ((keys - lo) >> 31) & 1, ((keys - hi) >> 31) & 1
        return below.sum(1, dtype=torch.int32), upto.sum(1, dtype=torch.int32)

    @torch.compile(dynamic=True)
    def write(bits: Tensor, key: Tensor, mask: Tensor) -> None:
        mask.copy_(((key - (bits & SIGN_OFF)) >> 31) & 1)

    key, lo, hi = (torch.tensor(threshold.key + away, dtype=torch.int32) for away in (0, -50_000, 50_000))
    parts = [weight.view(torch.int32).view(-1)[: weight.numel() // 256 * 256] for weight in weights]
    masks = [torch.empty_like(part, dtype=torch.int8) for part in parts]

    def passes() -> None:
        for part, mask in zip(parts, masks, strict=True):
            count(part, lo, hi)
            write(part, key, mask)

    passes()
    return timed(passes)[0]


def read_pass(weights: list[Tensor], device: str, timed: Callable[..., tuple[float, Any]] = clock_alone) -> float:
    """Return the seconds to read all weights once, at the bandwidth (reads and writes) of a copy of some of them."""
    source = max(weights, key=Tensor.numel).view(-1)
    if source.nbytes < 64 << 20:
        source = source.repeat(-(-(64 << 20) // source.nbytes))
    target = torch.empty_like(source)
    # On a GPU many copies are queued at once, so that starting them and waiting for them does not count.
    times = 1 if device == "cpu" else 20

    def copies() -> None:
        for _ in range(times):
            target.copy_(source)

    copy = min(timed(copies, device)[0] for _ in range(4)) / times
    return copy / 2 * sum(weight.nbytes for weight in weights) / source.nbytes


def check_same(weights: list[Tensor], ours: list[Tensor], theirs: list[Tensor], threshold: Threshold) -> int:
    """Return the number that the masks prune; raise AssertionError if they differ in more than ties at the threshold."""
    tie = magnitude_of_key(threshold.key)
    for weight, mask, other in zip(weights, ours, theirs, strict=True):
        differ = mask.view(-1) != other.bool().view(-1)
        assert bool((weight.view(-1)[differ].abs() == tie).all()), "a mask differs outside ties"
    return sum(other.numel() - int(torch.count_nonzero(other)) for other in theirs)
