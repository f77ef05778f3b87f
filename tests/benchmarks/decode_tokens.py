"""The tokens of `tests.benchmarks.decode` on a GPU: a captured step of the 1B, dense, sparse and rounded, and its memory."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import nn

from sparsity.compact.linear import SparseLinear
from sparsity.compact.replacement import sparse_linears_
from tests.benchmarks.common import Comparison
from tests.benchmarks.decode_generate import round_layers_
from tests.benchmarks.decode_timing import Rows, captured, replayed, seconds_of_each
from tests.benchmarks.decoder import Decoder, make_sparse_
from tests.benchmarks.event import Size

NUM_TOKENS = 40


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
