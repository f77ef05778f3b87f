"""Tokens a second of transformers' own `model.generate` with sparse layers, beside dense ones: a part of `decode`.

With a dynamic cache each step is launched by Python. With a static cache transformers compiles a step, on a GPU into a CUDA
graph. Sparse layers are measured one by one, with projections of the same input grouped, and grouped with int8 values.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from sparsity.compact.groups import group_linears_
from sparsity.compact.linear import SparseLinear, replace_
from sparsity.compact.packed import rounded
from sparsity.compact.replacement import sparse_linears_
from tests.benchmarks.common import Comparison
from tests.benchmarks.decoder import make_sparse_
from tests.benchmarks.event import Size

FEW_TOKENS, MANY_TOKENS, ROUNDS = 4, 36, 3


def llama(size: Size, head: int, device: str) -> LlamaForCausalLM:
    """Return transformers' model of random bfloat16 weights at a density of 0.2."""
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // head, head_dim=head, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    make_sparse_(model, 0.2)
    return model


def sparse(model: nn.Module, group: bool = True, int8: bool = False) -> nn.Module:
    """Return a copy whose layers are sparse in memory, whatever their density."""
    found = copy.deepcopy(model)
    # transformers keeps the compiled step of a static cache in the model, and a copy would call the step of the original.
    found.__dict__.pop("_compiled_call", None)
    sparse_linears_(found, most_density=1.0, group=False)
    if int8:
        round_layers_(found)
    if group:
        group_linears_(found)
    return found


def round_layers_(model: nn.Module) -> None:
    """Round the values of all sparse layers to int8, with a scale for each row."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            replace_(model, name, SparseLinear(rounded(module.packed), module.bias, module.weight.dtype))


def seconds_of_a_token(model: Any, cache: str, device: str) -> tuple[float, list[int]]:
    """Return the least seconds of a token over `ROUNDS`, after a warm-up, and the tokens."""
    prompt = torch.arange(8, device=device)[None]
    options: dict[str, Any] = {"do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    if cache == "static" and device == "cpu":
        options["compile_config"] = CompileConfig(backend="aot_eager", mode=None)
        options["compile_config"]._compile_all_devices = True

    def seconds(num_tokens: int) -> tuple[float, list[int]]:
        begin = clock(device)
        found = model.generate(prompt, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **options)
        return clock(device) - begin, found[0, 8:].tolist()

    # The longest first: the calls after it take the same static cache, so that nothing is compiled again.
    seconds(MANY_TOKENS)
    seconds(FEW_TOKENS)
    least, tokens = float("inf"), []
    for _ in range(ROUNDS):
        few, _ = seconds(FEW_TOKENS)
        many, tokens = seconds(MANY_TOKENS)
        least = min(least, (many - few) / (MANY_TOKENS - FEW_TOKENS))
    return least, tokens


def clock(device: str) -> float:
    """Return the time: of this thread's processor on a CPU, and of the clock once a GPU is done."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_generation(rows: Any, size: Size, head: int, device: str, caches: tuple[str, ...]) -> None:
    """Write a row for each cache and each form of the layers; each is a part of its own that may fail or come too late."""
    dense = llama(size, head, device)
    forms: dict[str, Callable[[], nn.Module]] = {
        "grouped": lambda: sparse(dense), "grouped int8": lambda: sparse(dense, int8=True),
        "one by one": lambda: sparse(dense, group=False),
    }  # fmt: skip
    for cache in caches:
        expected = rows.attempt(f"generate, {cache} cache, dense", seconds_of_a_token, dense, cache, device)
        for form, make in forms.items() if expected else ():
            name = f"generate, {cache} cache, {form}"
            found = rows.attempt(name, lambda make=make, cache=cache: seconds_of_a_token(make(), cache, device))
            if found is None:
                continue
            same = sum(int(a == b) for a, b in zip(found[1], expected[1], strict=True))
            details = {
                "tokens_per_second": 1 / found[0], "dense_tokens_per_second": 1 / expected[0],
                "same_tokens": f"{same} of {len(found[1])}",
            }  # fmt: skip
            rows.add(Comparison(name, found[0], f"dense, {cache} cache", expected[0], details).row())
