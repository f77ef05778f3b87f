"""Ways to multiply by a sparse layer and to decode a token, side by side on one GPU: which of them should be the default?

    python -m tests.benchmarks.decode_variants [--rehearse] [--seconds 60] [--output FILE]

Layers of the 1B: shapes of the kernel, started early or not (`spmv(early=True)`), in bf16 and int8, at densities of 0.2 and
0.5. Tokens of the 1B: small operations of torch or fused, layers dense, sparse, sparse started early, and int8, each captured
in one CUDA graph, with the share of time of each kernel. A part that fails or comes too late is a line with its reason.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from sparsity.compact.linear import SparseLinear, sparse_linears_
from sparsity.compact.packed import pack, rounded
from tests.benchmarks.common import RESULTS, Comparison
from tests.benchmarks.decode import (
    Layer,
    Rows,
    allocated,
    captured,
    copies,
    replayed,
    seconds_of_each,
    turns,
    weight_bytes,
)
from tests.benchmarks.decoder import Decoder, make_sparse_
from tests.benchmarks.event import ONE_B, TINY, Size, copy_bandwidth

LAYERS = [
    ((2048, 8192), 0.2), ((32_000, 2048), 0.2), ((8192, 2048), 0.2), ((2048, 2048), 0.2), ((2048, 8192), 0.5),
    ((32_000, 2048), 0.5),
]  # fmt: skip
WIDE = {0.2: [(1, 4, 4), (2, 4, 8), (1, 8, 4), (4, 1, 4)], 0.5: [(4, 1, 4), (1, 4, 4), (2, 2, 4)]}
NARROW = {0.2: [(4, 1, 4), (2, 2, 4), (8, 1, 8), (4, 2, 4)], 0.5: [(4, 1, 4), (8, 1, 4)]}
"""Rows, chunks and warps by density: of layers of 8192 columns, and of those of 2048."""
NUM_TOKENS = 40


def compare_layer(
    rows: Rows, layer: Layer, kernel: Any, variants: Sequence[tuple[tuple[int, int, int], bool]], bandwidth: float
) -> None:
    """Seconds of each shape, early or not, in bf16; then in int8 the fastest."""
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


def compare_vectors(rows: Rows, layer: Layer, kernel: Any, early: bool) -> None:
    packed = pack(layer.weight)
    all_copies = copies(packed, turns(packed.nbytes, layer.device))
    weights = [layer.weight, *(layer.weight.clone() for _ in range(turns(layer.weight.nbytes, layer.device) - 1))]
    for number in (2, 4, 8):
        x = torch.randn(number, layer.x.shape[1], device=layer.device).to(layer.x.dtype)
        expected = x.float() @ layer.weight.float().T
        error = float((kernel.spmv(packed, x).float() - expected).norm() / expected.norm())
        seconds = seconds_of_each(
            [lambda c=c, x=x: kernel.spmv(c, x, None, None, early) for c in all_copies],
            layer.device,  # type: ignore[misc]
        )
        dense = seconds_of_each(
            [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights],
            layer.device,  # type: ignore[misc]
        )
        name = f"{layer.name} at {layer.density}, {number} vectors"
        rows.add(Comparison(name, seconds, "F.linear bf16", dense, {"error": error}).row())


class Tokens:
    """One way of decoding: seconds of a captured step, its tokens, and what its kernels take."""

    def __init__(self, model: Decoder, device: str, fused: bool, early: bool, kernel: Any) -> None:
        from tests.benchmarks import decode_kernels

        def step() -> None:
            if fused:
                model.fused_step(decode_kernels, early)
            else:
                model.step()

        with mock.patch.object(kernel, "EARLY", early), torch.no_grad():
            model.start_anew()
            for block in model.blocks:
                block.cache.zero_()
            self.tokens: list[int] = []
            self.graph = None
            if device == "cpu":
                started = time.perf_counter()
                for _ in range(NUM_TOKENS // 10):
                    step()
                    self.tokens.append(int(model.token))
                self.seconds = (time.perf_counter() - started) / len(self.tokens)
            else:
                step()
                model.start_anew()
                self.graph = captured([step])
                for _ in range(NUM_TOKENS):
                    self.graph.replay()
                    self.tokens.append(int(model.token))
            self.caches = [block.cache.clone() for block in model.blocks]
            if self.graph is not None:
                self.seconds = replayed(self.graph, 50)

    def kernels(self) -> dict[str, list[float]]:
        """Microseconds of a step, and launches, of each kernel; the first eight."""
        if self.graph is None:
            return {}
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(5):
                self.graph.replay()
            torch.cuda.synchronize()
        events = [e for e in found.key_averages() if e.device_time_total > 0]
        events.sort(key=lambda e: -e.device_time_total)
        return {e.key[:60]: [e.device_time_total / 5, e.count / 5] for e in events[:10]}


@torch.no_grad()
def compare_tokens(
    rows: Rows, size: Size, head: int, device: str, kernel: Any, bandwidth: float, can_early: bool
) -> None:
    torch.manual_seed(0)
    before = allocated(device)
    model = Decoder(size, head, device)
    make_sparse_(model, 0.2)
    cache = sum(block.cache.nbytes for block in model.blocks)
    dense = {fused: Tokens(model, device, fused, False, kernel) for fused in (False, True)}
    dense_kernels = dense[True].kernels()
    ways = {"dense": dense[False], "dense, fused": dense[True]}
    if can_early:
        ways["dense, fused, early"] = Tokens(model, device, True, True, kernel)
    dense_bytes = weight_bytes(model)
    sparse_linears_(model)
    nbytes, memory = weight_bytes(model), allocated(device) - before - cache
    ways["sparse"] = Tokens(model, device, False, False, kernel)
    ways["sparse, fused"] = Tokens(model, device, True, False, kernel)
    profiles = {"dense, fused": dense_kernels, "sparse, fused": ways["sparse, fused"].kernels()}
    same_caches = None
    if can_early:
        ways["sparse, fused, early"] = Tokens(model, device, True, True, kernel)
        profiles["sparse, fused, early"] = ways["sparse, fused, early"].kernels()
        # The same kernels in the same order: what is read before it is written would differ.
        pairs = zip(ways["sparse, fused"].caches, ways["sparse, fused, early"].caches, strict=True)
        same_caches = all(torch.equal(first, second) for first, second in pairs)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], SparseLinear(rounded(module.packed)))
    int8_bytes = weight_bytes(model)
    ways["int8, fused"] = Tokens(model, device, True, can_early, kernel)
    expected = ways["dense, fused"]
    for name, way in ways.items():
        moved = dense_bytes if "dense" in name else int8_bytes if "int8" in name else nbytes
        baseline = ways["dense"] if "fused" not in name else expected
        same = sum(int(a == b) for a, b in zip(way.tokens, expected.tokens, strict=True))
        details: dict[str, Any] = {
            "tokens_per_second": 1 / way.seconds, "of_bound": moved / bandwidth / way.seconds,
            "weight_bytes": moved, "same_tokens": f"{same} of {len(way.tokens)}",
        }  # fmt: skip
        if name in profiles:
            details["kernels"] = profiles[name]
        if name == "sparse, fused, early":
            details["same_caches"] = same_caches
        if name == "sparse":
            details["memory_bytes"] = memory
        row = Comparison(f"a token of the 1B, {name}", way.seconds, "dense, the same way", baseline.seconds, details)
        rows.add(row.row())


def measure(rows: Rows, size: Size, device: str) -> None:
    from sparsity.compact import spmv as kernel

    is_gpu = device == "cuda"
    can_early = is_gpu and torch.cuda.get_device_capability() >= (9, 0)
    bandwidth = copy_bandwidth(device, 1 << (28 if is_gpu else 16))
    rows.add({"name": "copy", "bytes_per_second": bandwidth})
    head = 256 if is_gpu else 8
    rows.attempt("the 1B", compare_tokens, rows, size, head, device, kernel, bandwidth, can_early)
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
    wide = (2048, 8192) if is_gpu else (24, 96)
    rows.attempt("vectors", lambda: compare_vectors(rows, Layer(*wide, 0.2, device), kernel, can_early))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="at a tiny size on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="no part begins later")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode_variants.json")
    options = parser.parse_args()
    if options.rehearse and find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
        # Triton asks for its interpreter when it is imported, which torch may have done by now.
        command = [sys.executable, "-m", "tests.benchmarks.decode_variants", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode)
    rows = Rows(options.output, options.seconds)
    if options.rehearse:
        measure(rows, TINY, "cpu")
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here: add --rehearse to try the code at a tiny size on a CPU.")
    measure(rows, ONE_B, "cuda")


if __name__ == "__main__":
    main()
