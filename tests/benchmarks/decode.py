"""Measure decoding of one sequence with sparse weights on a GPU, by layer and by token, against dense weights.

    python -m tests.benchmarks.decode [--cpu | --rehearse] [--generate] [--seconds 60] [--output FILE] -> runs/bench/decode.json

It first measures tokens per second and memory of the 1B at 80 %: dense, sparse, and sparse with values rounded to int8. Each
is captured in one CUDA graph, once with a step's small operations in fused kernels (`tests/benchmarks/decode_kernels.py`) and
once with torch's. Then come the 1B's layers at several densities: our kernel and `F.linear` in bf16, captured in one graph;
each launch reads weights that are in no cache. Then come several vectors, torch's CSR product, and 2:4 at a density of 0.5 (its
vector is padded to 8). Last comes transformers' `model.generate` with a dynamic cache (`tests/benchmarks/decode_generate.py`).
`--generate` measures only that, with a static cache too, for which each form of the model is compiled: some minutes on a GPU.

`of_bound` is the time to read the bytes of a launch at the speed of a copy, divided by the time that the launch takes. If a
part fails, or would begin after `--seconds`, the file has a line with the reason. `--cpu` measures layers and two blocks on one
thread, in processor seconds. `--rehearse` does the same as on a GPU, but at a tiny size on a CPU, with Triton's interpreter if
Triton is installed: its seconds mean nothing. Missed goals are named at the end, with exit code 1, but not in a rehearsal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.common import RESULTS, finish, interpret_kernels
from tests.benchmarks.decode_cpu import measure_on_cpu
from tests.benchmarks.decode_generate import measure_generation
from tests.benchmarks.decode_layers import Layer, measure_csr, measure_layer, measure_pairs, measure_vectors
from tests.benchmarks.decode_timing import Rows
from tests.benchmarks.decode_tokens import measure_model
from tests.benchmarks.event import ONE_B, TINY, Size, copy_bandwidth

DENSITIES = (0.2, 0.5, 0.6, 0.35, 0.1)
GOALS = {("2048 x 8192", 0.2): 2.5, ("32000 x 2048", 0.2): 2.5, ("2048 x 8192", 0.5): 1.3, ("32000 x 2048", 0.5): 1.3}
TOKENS_GOAL, MEMORY_GOAL = 2.0, 0.85e9


def measure(rows: Rows, size: Size, device: str) -> None:
    from sparsity.compact import spmv as kernel

    shapes = [(2048, 8192), (32_000, 2048), (8192, 2048), (2048, 2048)] if device == "cuda" else [(24, 96), (40, 64)]
    bandwidth = copy_bandwidth(device, 1 << (28 if device == "cuda" else 16))
    rows.add({"name": "copy", "bytes_per_second": bandwidth})
    rows.attempt("the 1B", measure_model, rows, size, 256 if device == "cuda" else 8, device, bandwidth)
    dense: dict[tuple[int, int], float] = {}
    for shape in shapes:
        seconds = rows.attempt(f"F.linear {shape}", lambda shape=shape: Layer(*shape, 0.2, device).dense_seconds())
        dense[shape] = float("nan") if seconds is None else seconds

    def of(shape: tuple[int, int], density: float) -> Layer:
        return Layer(*shape, density, device)

    for density in DENSITIES:
        for shape in shapes:
            rows.attempt(
                f"{shape[0]} x {shape[1]} at {density}",
                lambda shape=shape, density=density: measure_layer(
                    rows, of(shape, density), kernel, dense[shape], bandwidth
                ),
            )
    rows.attempt("vectors", lambda: measure_vectors(rows, of(shapes[0], 0.2), kernel))
    for shape in shapes[:2]:
        rows.attempt("torch CSR", lambda shape=shape: measure_csr(rows, of(shape, 0.2), dense[shape]))
    for shape in shapes[:2]:
        rows.attempt("torch 2:4", lambda shape=shape: measure_pairs(rows, of(shape, 0.5), dense[shape]))
    generate(rows, size, device, ("dynamic",))


def generate(rows: Rows, size: Size, device: str, caches: tuple[str, ...] = ("dynamic", "static")) -> None:
    head = 256 if device == "cuda" else 8
    rows.attempt("generate", measure_generation, rows, size, head, device, caches)


def missed_goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each goal that is missed, and for each part that failed."""
    by_name = {row["name"]: row for row in rows}
    goals = {f"{shape} at {density}": goal for (shape, density), goal in GOALS.items()}
    goals["a token of the 1B at 0.2"] = TOKENS_GOAL
    missed = []
    for name, goal in goals.items():
        ratio = by_name.get(name, {}).get("ratio", 0.0)
        if not ratio >= goal:
            missed.append(f"{name}: {ratio:.3g} times as fast, the goal is {goal:g}.")
    memory = by_name.get("a token of the 1B at 0.2", {}).get("memory_bytes", 0)
    if memory > MEMORY_GOAL:
        missed.append(f"The 1B takes {memory / 1e9:.3g} GB, the goal is {MEMORY_GOAL / 1e9:g} GB.")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="at a tiny size on a CPU")
    parser.add_argument("--cpu", action="store_true", help="what a CPU makes of it, in numba, on one thread")
    parser.add_argument("--generate", action="store_true", help="transformers' model.generate alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="no part begins later")
    parser.add_argument("--output", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args()
    rows = Rows(options.output, options.seconds)
    if options.rehearse:
        interpret_kernels("tests.benchmarks.decode")
        (generate if options.generate else measure)(rows, TINY, "cpu")
        return
    if options.cpu:
        measure_on_cpu(rows, 2)
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here: add --cpu, or --rehearse to try the code at a tiny size on a CPU.")
    if options.generate:
        generate(rows, ONE_B, "cuda")
        return
    measure(rows, ONE_B, "cuda")
    finish(missed_goals(rows.rows))


if __name__ == "__main__":
    main()
