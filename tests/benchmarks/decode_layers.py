"""The layers of `tests.benchmarks.decode` on a GPU: the sparse product against `F.linear`, torch's CSR and 2:4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from sparsity.compact.packed import Packed, pack
from tests.benchmarks.common import Comparison
from tests.benchmarks.decode_timing import Call, Rows, copies, seconds_of_each, turns


def random_weight(rows: int, columns: int, density: float, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows + columns)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    weight.normal_(0, 0.02, generator=generator)
    keep = torch.empty(rows, columns, device=device).uniform_(generator=generator) < density
    return weight.masked_fill_(~keep, 0)


def product(kernel: Any, packed: Packed, x: Tensor, shape: Any = None) -> Call:
    return lambda: kernel.spmv(packed, x, None, shape)


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
