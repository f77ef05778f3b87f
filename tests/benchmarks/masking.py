"""Measure how long it takes to zero a gradient by its mask of bytes, against a mask of bits and torch's own operations.

    python -m tests.benchmarks.masking [--numel 50000000] [--rounds 5] [--device cuda]     -> runs/bench/masking.json

Every training step does this once to each gradient. The methods take turns, and the best round of each counts; on a CPU the
seconds are the processor time of one thread. All methods must give the same zeros. `one read pass` is the lower bound: the
time to read the gradients once at the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsity.mask import pack_mask, zero_pruned_
from sparsity.shards import chunks
from tests.benchmarks.common import RESULTS, Comparison, clock_alone, devices, in_process, publish
from tests.benchmarks.peers import FLOOR, make_weights, read_pass

MODULE = "tests.benchmarks.masking"
OURS = "zero_pruned_"
DENSITY = 0.2
SIZES = {OURS: 1.0, "bits": 1 / 8, "where": 1.0, "masked_fill": 2.0, "multiply": 1.0}
"""The bytes of a mask for each weight; masked_fill_ needs the inverse mask."""


def by_bits(gradient: Tensor, bits: Tensor) -> None:
    """Unpack bits in chunks, by numpy on a CPU and with shifts on a GPU, and then zero as with bytes."""
    flat = gradient.view(-1)
    if flat.device.type == "cpu":
        as_integers = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int16)
        # Chunks have as many weights as with bytes; the last byte may hold fewer than eight.
        for part in chunks(bits.numel(), flat.device, on_cpu=1 << 13):
            weights = as_integers[8 * part.start : 8 * part.stop]
            kept = np.unpackbits(bits[part].numpy(), bitorder="little", count=len(weights))
            weights.bitwise_and_(torch.from_numpy(kept.view(np.int8)).to(weights.dtype).neg_())
        return
    shifts = torch.arange(8, dtype=torch.uint8, device=flat.device)
    kept = (bits[:, None] >> shifts & 1).view(-1)[: flat.numel()].bool()
    torch.where(kept, flat, flat.new_zeros(()), out=flat)


def by_where(gradient: Tensor, mask: Tensor) -> None:
    torch.where(mask, gradient.view(-1), gradient.new_zeros(()), out=gradient.view(-1))


def by_masked_fill(gradient: Tensor, pruned: Tensor) -> None:
    gradient.view(-1).masked_fill_(pruned, 0)


def by_product(gradient: Tensor, mask: Tensor) -> None:
    """Multiply by the mask: short to write, but it leaves -0.0 and keeps NaN."""
    gradient.view(-1).mul_(mask)


def time_masking(numel: int, rounds: int, device: str, dtype: str) -> dict[str, float]:
    """Return each method's best seconds on the same gradients and masks, after a warm-up; compare the zeros once."""
    torch.set_num_threads(1)
    gradients = make_weights(numel, device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    masks = [torch.rand(few.numel(), generator=generator, device=device) < DENSITY for few in gradients]
    opposite = [~mask for mask in masks]
    packed = [pack_mask(mask).to(device) for mask in masks]
    methods: dict[str, tuple[Callable[[Tensor, Tensor], None], list[Tensor]]] = {
        OURS: (zero_pruned_, masks),
        "bits": (by_bits, packed),
        "where": (by_where, masks),
        "masked_fill": (by_masked_fill, opposite),
        "multiply": (by_product, masks),
    }
    for name, (method, by) in methods.items():
        for gradient, mask, one in zip(gradients, masks, by, strict=True):
            found, expected = gradient.clone(), gradient.view(-1) * mask
            method(found, one)
            assert torch.equal(found.view(-1), expected), f"{name} leaves other gradients"

    def all_of(name: str) -> None:
        method, by = methods[name]
        for gradient, mask in zip(gradients, by, strict=True):
            method(gradient, mask)

    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name in methods:
            seconds.setdefault(name, []).append(clock_alone(partial(all_of, name), device)[0])
        seconds.setdefault(FLOOR, []).append(read_pass(gradients, device))
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def compare(numel: int, rounds: int, device: str, dtype: str) -> list[Comparison]:
    """Compare our method with each peer, in a separate process."""
    seconds = in_process(MODULE, "time_masking", numel, rounds, device, dtype)
    details = {"numel": numel, "dtype": dtype, "device": device, "mask_bytes_per_weight": SIZES[OURS]}
    return [
        Comparison(
            "masking gradients",
            seconds[OURS],
            peer,
            seconds[peer],
            {**details, "peer_bytes_per_weight": SIZES.get(peer)},
        )
        for peer in seconds
        if peer != OURS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "masking.json")
    parser.add_argument("--device", action="append", choices=devices(), help="this one alone")
    options = parser.parse_args()
    found = [
        row
        for device in options.device or devices()
        for dtype in ("float32", "bfloat16")
        for row in compare(options.numel, options.rounds, device, dtype)
    ]
    publish(found, options.output, ["numel", "dtype", "device", "peer_bytes_per_weight"])


if __name__ == "__main__":
    main()
