"""Decoding on one thread of a CPU, for `tests.benchmarks.decode --cpu`: layers and tokens, in processor seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from sparsity.compact.linear import SparseLinear
from sparsity.compact.packed import pack
from sparsity.compact.replacement import sparse_linears_
from tests.benchmarks.common import Comparison
from tests.benchmarks.decode_generate import measure_generation
from tests.benchmarks.decode_layers import Layer
from tests.benchmarks.decode_timing import Call, Rows, copies
from tests.benchmarks.decode_tokens import weight_bytes
from tests.benchmarks.decoder import Decoder, make_sparse_
from tests.benchmarks.event import Size

MORE_THAN_CPU_CACHES = 80_000_000
"""The bytes of all copies of a dense weight together, on a CPU with 32 MB of third-level cache."""


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
