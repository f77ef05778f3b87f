"""Compare launch shapes of the sparse product on one GPU, to see which of them `spmv.shape_for` should choose.

    python -m tests.benchmarks.decode_variants [--rehearse] [--seconds 60] [--output FILE]

It measures layers of the 1B at densities of 0.2 and 0.5, in bf16 and int8, started early or not. A part that fails or is too
late gives a line with the reason. `python -m tests.benchmarks.decode` measures the shapes that were chosen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsity.compact.packed import pack, rounded
from tests.benchmarks.common import RESULTS, Comparison, interpret_kernels
from tests.benchmarks.decode_layers import Layer
from tests.benchmarks.decode_timing import Rows, copies, seconds_of_each, turns
from tests.benchmarks.event import copy_bandwidth

LAYERS = [
    ((2048, 8192), 0.2), ((32_000, 2048), 0.2), ((8192, 2048), 0.2), ((2048, 2048), 0.2), ((2048, 8192), 0.5),
    ((32_000, 2048), 0.5),
]  # fmt: skip
WIDE = {0.2: [(2, 4, 8), (1, 8, 8), (4, 2, 8)], 0.5: [(1, 4, 4), (2, 4, 8), (4, 2, 8)]}
NARROW = {0.2: [(8, 1, 8), (2, 2, 4), (16, 1, 8), (8, 2, 16)], 0.5: [(8, 1, 4), (8, 1, 8), (16, 1, 8)]}
"""Rows, chunks and warps by density, for layers of 8192 columns and for layers of 2048."""


def compare_layer(
    rows: Rows, layer: Layer, kernel: Any, variants: Sequence[tuple[tuple[int, int, int], bool]], bandwidth: float
) -> None:
    """Measure each shape in bf16, started early or not, then the fastest in int8."""
    dense = layer.dense_seconds()
    packed = pack(layer.weight)
    expected = layer.x.float() @ layer.weight.float().T
    for kind, one in (("bf16", packed), ("int8", rounded(packed))):
        found: dict[str, float] = {}
        error = 0.0
        all_copies = copies(one, turns(one.nbytes, layer.device))
        for shape, early in variants:
            if time.monotonic() > rows.deadline:
                break
            calls = [
                lambda c=c, s=shape, e=early: kernel.spmv(c, layer.x, None, kernel.Shape(*s), e)  # type: ignore[misc]
                for c in all_copies
            ]
            error = max(error, float((calls[0]().float() - expected).norm() / expected.norm()))
            found[variant_name(shape, early)] = seconds_of_each(calls, layer.device, 5)
        best = min(found, key=found.__getitem__)
        details = {
            "best": best, "error": error, "of_bound": one.nbytes / bandwidth / found[best], "variants": found,
            "num_chunks": packed.num_chunks, "bits_a_weight": 8 * one.nbytes / layer.weight.numel(),
        }  # fmt: skip
        name = f"{layer.name} at {layer.density}, {kind}"
        rows.add(Comparison(name, found[best], "F.linear bf16", dense, details).row())
        variants = [variant for variant in variants if variant_name(*variant) == best]


def variant_name(shape: tuple[int, int, int], early: bool) -> str:
    return " x ".join(map(str, shape)) + (" early" if early else "")


def measure(rows: Rows, device: str) -> None:
    from sparsity.compact import spmv as kernel

    is_gpu = device == "cuda"
    can_early = is_gpu and torch.cuda.get_device_capability() >= (9, 0)
    bandwidth = copy_bandwidth(device, 1 << (28 if is_gpu else 16))
    rows.add({"name": "copy", "bytes_per_second": bandwidth})
    for shape, density in LAYERS if is_gpu else [((24, 96), 0.2), ((40, 64), 0.5)]:
        shapes = (WIDE if shape[1] > 2048 else NARROW)[density] if is_gpu else [(1, 1, 1)]
        variants = [(one, can_early) for one in shapes]
        if can_early and density == 0.2:
            variants += [(one, False) for one in shapes[:2]]
        rows.attempt(
            f"{shape[0]} x {shape[1]} at {density}",
            lambda shape=shape, density=density, variants=variants: compare_layer(
                rows, Layer(*shape, density, device), kernel, variants, bandwidth
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="at a tiny size on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="no part begins later")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode_variants.json")
    options = parser.parse_args()
    rows = Rows(options.output, options.seconds)
    if options.rehearse:
        interpret_kernels("tests.benchmarks.decode_variants")
        measure(rows, "cpu")
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here: add --rehearse to try the code at a tiny size on a CPU.")
    measure(rows, "cuda")


if __name__ == "__main__":
    main()
