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
import gc
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from sparsity.compact.linear import SparseLinear
from sparsity.compact.packed import Packed, pack
from sparsity.compact.replacement import sparse_linears_
from tests.benchmarks.common import RESULTS, Comparison, finish, write_rows
from tests.benchmarks.decode_generate import measure_generation, round_layers_
from tests.benchmarks.decoder import Decoder, make_sparse_
from tests.benchmarks.event import ONE_B, TINY, Size, copy_bandwidth

Call = Callable[[], Any]
DENSITIES = (0.2, 0.5, 0.6, 0.35, 0.1)
NUM_TOKENS = 40
GOALS = {("2048 x 8192", 0.2): 2.5, ("32000 x 2048", 0.2): 2.5, ("2048 x 8192", 0.5): 1.3, ("32000 x 2048", 0.5): 1.3}
TOKENS_GOAL, MEMORY_GOAL = 2.0, 0.85e9
MORE_THAN_CACHES = 150_000_000
"""The bytes of all copies of a weight together. They take turns, so that none is in the cache; an H200's L2 has 60 MB."""
MORE_THAN_CPU_CACHES = 80_000_000
"""The same for dense weights on a CPU with 32 MB of third-level cache."""


class Rows:
    """The rows of the file, which is written after each row. A part that fails or is too late gives a row that says why."""

    def __init__(self, output: Path, seconds: float) -> None:
        self.output, self.deadline = output, time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "name"]
        print(f"{row['name']}: {', '.join(words)}", flush=True)
        write_rows(self.rows, self.output)

    def attempt(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Return the value of a part, or None if it fails or there is no time for it."""
        if time.monotonic() > self.deadline:
            self.add({"name": name, "left_out": "out of time"})
            return None
        try:
            return part(*arguments)
        except Exception as error:
            traceback.print_exc()
            reason = next(iter(str(error).splitlines()), "")
            self.add({"name": name, "failed": f"{type(error).__name__}: {reason}"})
            return None


def seconds_of_each(calls: Sequence[Call], device: str, rounds: int = 7) -> float:
    """Return the median seconds per call of `calls` run in sequence, after a warm-up; on a GPU as one captured graph."""
    for call in calls:
        call()
    if device == "cpu":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    graph = captured(calls)
    return replayed(graph, rounds) / len(calls)


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph: torch.cuda.CUDAGraph, rounds: int) -> float:
    """Return the median seconds of a replay."""
    taken = []
    for _ in range(rounds + 2):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last) / 1e3)
    return statistics.median(taken[2:])


def turns(nbytes: int, device: str) -> int:
    """Return the number of copies of `nbytes` bytes that take turns."""
    return 1 if device == "cpu" else min(96, max(4, -(-MORE_THAN_CACHES // nbytes)))


def copies(packed: Packed, count: int) -> list[Packed]:
    def copy() -> Packed:
        parts = {name: part.clone() for name, part in vars(packed).items() if isinstance(part, Tensor)}
        return replace(packed, **parts)

    return [packed, *(copy() for _ in range(count - 1))]


def random_weight(rows: int, columns: int, density: float, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows + columns)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    weight.normal_(0, 0.02, generator=generator)
    keep = torch.empty(rows, columns, device=device).uniform_(generator=generator) < density
    return weight.masked_fill_(~keep, 0)


def product(kernel: Any, packed: Packed, x: Tensor, shape: Any = None) -> Call:
    return lambda: kernel.spmv(packed, x, None, shape)


# --- layers ---


class Layer:
    """A matrix of the 1B at one density; the dense seconds are measured once per size."""

    def __init__(self, rows: int, columns: int, density: float, device: str) -> None:
        self.name = f"{rows} x {columns}"
        self.density, self.device = density, device
        self.weight = random_weight(rows, columns, density, device)
        self.x = torch.randn(1, columns, device=device).to(torch.bfloat16)

    def dense_seconds(self) -> float:
        weights = [self.weight, *(self.weight.clone() for _ in range(turns(self.weight.nbytes, self.device) - 1))]
        return seconds_of_each([lambda w=w: F.linear(self.x, w) for w in weights], self.device)  # type: ignore[misc]


def measure_layer(rows: Rows, layer: Layer, kernel: Any, dense: float, bandwidth: float) -> None:
    packed = pack(layer.weight)
    expected = layer.x.float() @ layer.weight.float().T
    error = float((kernel.spmv(packed, layer.x).float() - expected).norm() / expected.norm())
    all_copies = copies(packed, turns(packed.nbytes, layer.device))
    seconds = seconds_of_each([product(kernel, one, layer.x) for one in all_copies], layer.device)
    nbytes, shape = packed.nbytes, kernel.shape_for(len(layer.weight), packed.num_chunks)
    details = {
        "density": layer.density, "shape": list(shape), "num_chunks": packed.num_chunks,
        "bytes": nbytes, "bits_a_weight": 8 * nbytes / layer.weight.numel(), "of_bound": nbytes / bandwidth / seconds,
        "dense_of_bound": layer.weight.nbytes / bandwidth / dense, "error": error,
    }  # fmt: skip
    rows.add(Comparison(f"{layer.name} at {layer.density}", seconds, "F.linear bf16", dense, details).row())


def measure_vectors(rows: Rows, layer: Layer, kernel: Any) -> None:
    """Measure the number of vectors from which the dense product is faster."""
    packed = pack(layer.weight)
    all_copies = copies(packed, turns(packed.nbytes, layer.device))
    weights = [layer.weight, *(layer.weight.clone() for _ in range(turns(layer.weight.nbytes, layer.device) - 1))]
    for number in (2, 4, 8):
        x = layer.x.expand(number, -1).contiguous()
        seconds = seconds_of_each([product(kernel, one, x) for one in all_copies], layer.device)
        dense = seconds_of_each([lambda w=w, x=x: F.linear(x, w) for w in weights], layer.device)  # type: ignore[misc]
        rows.add(
            Comparison(f"{layer.name} at {layer.density}, {number} vectors", seconds, "F.linear bf16", dense).row()
        )


def measure_csr(rows: Rows, layer: Layer, dense: float) -> None:
    """Measure torch's CSR product without a graph, because cuSPARSE may allocate; launches are queued back to back."""
    weight, x = layer.weight.to_sparse_csr(), layer.x.t().contiguous()
    weight @ x
    end = queue_timer(layer.device)
    for _ in range(20):
        weight @ x
    rows.add(Comparison(f"torch CSR, {layer.name} at {layer.density}", end() / 20, "F.linear bf16", dense).row())


def measure_pairs(rows: Rows, layer: Layer, dense: float) -> None:
    order = torch.rand(layer.weight.numel() // 4, 4, device=layer.device).argsort(-1)
    weight = (layer.weight + 1).masked_fill((order < 2).view_as(layer.weight), 0)
    pairs, x = to_sparse_semi_structured(weight), layer.x.expand(8, -1).contiguous()
    F.linear(x, pairs)
    end = queue_timer(layer.device)
    for _ in range(20):
        F.linear(x, pairs)
    rows.add(Comparison(f"torch 2:4, {layer.name}, 8 vectors", end() / 20, "F.linear bf16", dense).row())


def queue_timer(device: str) -> Callable[[], float]:
    from tests.benchmarks.event import timer

    return timer(device)()


# --- the model ---


class Tokens:
    """One way of decoding: the seconds of a captured step, the tokens it gives, and the time of its kernels."""

    def __init__(self, model: Decoder, device: str, is_fused: bool) -> None:
        from sparsity.compact.spmv import can_start_early
        from tests.benchmarks import decode_kernels

        def step() -> None:
            if is_fused:
                model.fused_step(decode_kernels, can_start_early(model.norm.device))
            else:
                model.step()

        model.start_anew()
        self.tokens: list[int] = []
        self.graph = None
        if device == "cpu":
            started = time.perf_counter()
            for _ in range(NUM_TOKENS // 10):
                step()
                self.tokens.append(int(model.token))
            self.seconds = (time.perf_counter() - started) / len(self.tokens)
            return
        step()
        model.start_anew()
        self.graph = captured([step])
        for _ in range(NUM_TOKENS):
            self.graph.replay()
            self.tokens.append(int(model.token))
        self.seconds = replayed(self.graph, 50)

    def kernels(self) -> dict[str, list[float]]:
        """Return the ten kernels that take the most time of a step, with their microseconds and launches per step."""
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
def measure_model(rows: Rows, size: Size, head: int, device: str, bandwidth: float) -> None:
    """Measure tokens per second and memory: dense, sparse and sparse int8, with small operations fused and separate."""
    torch.manual_seed(0)
    before = allocated(device)
    model = Decoder(size, head, device)
    make_sparse_(model, 0.2)
    cache = sum(block.cache.nbytes for block in model.blocks)
    dense_bytes, dense_memory = weight_bytes(model), allocated(device) - before - cache
    dense = {is_fused: decoded(model, device, is_fused) for is_fused in (True, False)}
    calls = model.linear_calls()
    dense_linear = seconds_of_each(calls, device, 20) * len(calls)
    del calls
    names = sparse_linears_(model)
    memory = allocated(device) - before - cache
    for kind in ("", ", int8"):
        if kind:
            round_layers_(model)
        nbytes = weight_bytes(model)
        for is_fused in (True, False):
            found, expected = decoded(model, device, is_fused), dense[is_fused]
            same = sum(int(a == b) for a, b in zip(found["tokens"], expected["tokens"], strict=True))
            details = {
                "tokens_per_second": 1 / found["seconds"], "dense_tokens_per_second": 1 / expected["seconds"],
                "weight_bytes": nbytes, "dense_weight_bytes": dense_bytes, "memory_bytes": memory,
                "dense_memory_bytes": dense_memory, "of_bound": nbytes / bandwidth / found["seconds"],
                "sparse_layers": len(names), "same_tokens": f"{same} of {len(found['tokens'])}",
                "kernels": found["kernels"], "dense_kernels": expected["kernels"],
            }  # fmt: skip
            if kind:
                del details["memory_bytes"], details["dense_memory_bytes"]
            name = f"a token of the 1B at 0.2{kind}" + ("" if is_fused else ", single operations")
            baseline = "dense bf16, captured too"
            rows.add(Comparison(name, found["seconds"], baseline, expected["seconds"], details).row())
        calls = model.linear_calls()
        linear = seconds_of_each(calls, device, 20) * len(calls)
        rows.add(Comparison(f"all linear layers of the 1B at 0.2{kind}", linear, "F.linear bf16", dense_linear).row())
        del calls


def decoded(model: Decoder, device: str, is_fused: bool) -> dict[str, Any]:
    """Return seconds, tokens and kernels of one way of decoding; its graph is freed afterwards."""
    found = Tokens(model, device, is_fused)
    return {"seconds": found.seconds, "tokens": found.tokens, "kernels": found.kernels() if is_fused else {}}


def weight_bytes(model: nn.Module) -> int:
    return sum(
        t.nbytes for m in model.modules() if isinstance(m, (nn.Linear, SparseLinear)) for t in m.state_dict().values()
    )


def allocated(device: str) -> int:
    """Return the bytes of tensors, after cuBLAS's workspaces are freed, which would be counted too."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if device == "cuda" and clear is not None:
        gc.collect()
        clear()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


# --- all of it ---


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


def measure_on_cpu(rows: Rows, layers: int) -> None:
    """Measure one thread: the 1B's layers against dense bf16 and torch's CSR, and tokens of a model with fewer blocks."""
    torch.set_num_threads(1)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / thread_seconds([lambda: target.copy_(source)])[0]
    rows.add({"name": "copy", "bytes_per_second": bandwidth})
    for shape, density in [((2048, 8192), 0.2), ((8192, 2048), 0.2), ((2048, 2048), 0.2), ((2048, 8192), 0.1)]:
        rows.attempt(f"{shape} at {density}", measure_cpu_layer, rows, Layer(*shape, density, "cpu"), bandwidth)
    rows.attempt("2:4", lambda: to_sparse_semi_structured(torch.zeros(64, 64, dtype=torch.bfloat16)))
    rows.attempt("tokens", measure_cpu_tokens, rows, Size(2048, 8192, layers, 32_000), bandwidth)
    size = Size(2048, 8192, layers, 32_000)
    rows.attempt("generate", measure_generation, rows, size, 256, "cpu", ("dynamic",))


def measure_cpu_layer(rows: Rows, layer: Layer, bandwidth: float) -> None:
    """Measure one layer; copies of it take turns, as a model's layers do, so that none is in the cache."""
    count = -(-MORE_THAN_CPU_CACHES // layer.weight.nbytes)
    packed = [SparseLinear(one) for one in copies(pack(layer.weight), count)]
    weights = [layer.weight, *(layer.weight.clone() for _ in range(count - 1))]
    csr, x = layer.weight.float().to_sparse_csr(), layer.x.float().t().contiguous()
    ours, dense = thread_seconds(
        [lambda: [one(layer.x) for one in packed], lambda: [F.linear(layer.x, weight) for weight in weights]]
    )
    ours, dense, (theirs,) = ours / count, dense / count, thread_seconds([lambda: csr @ x])
    expected = layer.x.float() @ layer.weight.float().T
    nbytes = packed[0].packed.nbytes
    details = {
        "density": layer.density, "bytes": nbytes, "of_bound": nbytes / bandwidth / ours,
        "dense_bytes": layer.weight.nbytes, "dense_of_bound": layer.weight.nbytes / bandwidth / dense,
        "error": float((packed[0](layer.x).float() - expected).norm() / expected.norm()),
    }  # fmt: skip
    name = f"{layer.name} at {layer.density}"
    rows.add(Comparison(name, ours, "F.linear bf16", dense, details).row())
    rows.add(Comparison(f"{name}, ours", ours, "torch CSR float32", theirs).row())


@torch.no_grad()
def measure_cpu_tokens(rows: Rows, size: Size, bandwidth: float) -> None:
    torch.manual_seed(0)
    model = Decoder(size, 256, "cpu")
    make_sparse_(model, 0.2)
    dense_bytes, (dense,) = weight_bytes(model), thread_seconds([model.step])
    sparse_linears_(model)
    nbytes, (ours,) = weight_bytes(model), thread_seconds([model.step])
    details = {
        "tokens_per_second": 1 / ours, "dense_tokens_per_second": 1 / dense, "weight_bytes": nbytes,
        "dense_weight_bytes": dense_bytes, "of_bound": nbytes / bandwidth / ours,
    }  # fmt: skip
    name = f"a token of {size.layers} blocks of the 1B and its head at 0.2"
    rows.add(Comparison(name, ours, "dense bf16", dense, details).row())


def thread_seconds(calls: Sequence[Call], rounds: int = 9) -> list[float]:
    """Return this thread's processor seconds for each call: the minimum over rounds in which the calls take turns."""
    found = [float("inf")] * len(calls)
    for number in range(rounds + 1):
        for place, call in enumerate(calls):
            started = time.thread_time()
            call()
            if number:
                found[place] = min(found[place], time.thread_time() - started)
    return found


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
    if options.rehearse and find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
        # Triton reads the variable when it is imported, and torch may have imported it already.
        command = [sys.executable, "-m", "tests.benchmarks.decode", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode)
    rows = Rows(options.output, options.seconds)
    if options.rehearse:
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
