"""The small operations of a decoding step in four Triton kernels, used with dense and with sparse layers.

As separate torch operations they take about twenty launches per block in addition to the four products, and each launch
takes about 2 microseconds however little it does. `TRITON_INTERPRET=1` runs the kernels on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEAD_SLICE = 32
"""The dimensions of a head that one program mixes; every program of a head computes all scores of that head."""


@triton.jit
def _start(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    x, token, delta, weight, out, normed, size, HAS_TOKEN: tl.constexpr, HAS_DELTA: tl.constexpr, SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, SIZE)
    is_there = place < size
    scale = tl.load(weight + place, mask=is_there, other=0).to(tl.float32)
    _start(EARLY)
    if HAS_TOKEN:
        x += tl.load(token) * size
    found = tl.load(x + place, mask=is_there, other=0).to(tl.float32)
    if HAS_DELTA:
        found += tl.load(delta + place, mask=is_there, other=0).to(tl.float32)
    found = found.to(out.dtype.element_ty)
    tl.store(out + place, found, mask=is_there)
    found = found.to(tl.float32)
    found *= tl.rsqrt(tl.sum(found * found, 0) / size + 1e-5)
    tl.store(normed + place, (found * scale).to(normed.dtype.element_ty), mask=is_there)


@triton.jit
def _attention(  # type: ignore[no-untyped-def]
    qkv, cache, cosines, sines, position, out, num_heads, LENGTH: tl.constexpr, HALF: tl.constexpr,
    SLICE: tl.constexpr, POSITIONS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _start(EARLY)
    HEAD: tl.constexpr = 2 * HALF
    NUM_SLICES: tl.constexpr = HEAD // SLICE
    head, part = tl.program_id(0) // NUM_SLICES, tl.program_id(0) % NUM_SLICES
    half, places = tl.arange(0, HALF), tl.arange(0, POSITIONS)
    mine = part * SLICE + tl.arange(0, SLICE)
    now = tl.load(position)
    turn = now * HEAD + half
    cosine, sine = tl.load(cosines + turn).to(tl.float32), tl.load(sines + HALF + turn).to(tl.float32)
    query, key, value = qkv + head * HEAD, qkv + (num_heads + head) * HEAD, qkv + (2 * num_heads + head) * HEAD
    first, second = tl.load(query + half).to(tl.float32), tl.load(query + HALF + half).to(tl.float32)
    query_first, query_second = first * cosine - second * sine, second * cosine + first * sine
    first, second = tl.load(key + half).to(tl.float32), tl.load(key + HALF + half).to(tl.float32)
    key_first = (first * cosine - second * sine).to(out.dtype.element_ty)
    key_second = (second * cosine + first * sine).to(out.dtype.element_ty)
    own_value = tl.load(value + mine)
    keys = cache + head.to(tl.int64) * LENGTH * HEAD
    values = keys + num_heads * LENGTH * HEAD
    # All programs of a head write the same bytes of its key, so their order does not matter.
    tl.store(keys + now * HEAD + half, key_first)
    tl.store(keys + now * HEAD + HALF + half, key_second)
    tl.store(values + now * HEAD + mine, own_value)
    scale = 1.0 / tl.sqrt(tl.full([], HEAD, tl.float32))
    # The token's own score is the first maximum.
    most = scale * tl.sum(query_first * key_first.to(tl.float32) + query_second * key_second.to(tl.float32), 0)
    total = tl.full([], 1.0, tl.float32)
    mixed = own_value.to(tl.float32)
    for begin in range(0, LENGTH, POSITIONS):
        if begin < now:
            place = begin + places
            is_before = place < now
            at = keys + place[:, None] * HEAD + half[None, :]
            # Values are read before the scores are known, so that the read does not wait for them.
            low = tl.load(at, mask=is_before[:, None], other=0).to(tl.float32)
            high = tl.load(at + HALF, mask=is_before[:, None], other=0).to(tl.float32)
            found = tl.load(values + place[:, None] * HEAD + mine[None, :], mask=is_before[:, None], other=0)
            score = scale * tl.sum(low * query_first[None, :] + high * query_second[None, :], 1)
            score = tl.where(is_before, score, float("-inf"))
            higher = tl.maximum(most, tl.max(score, 0))
            share, fade = tl.exp(score - higher), tl.exp(most - higher)
            mixed = mixed * fade + tl.sum(share[:, None] * found.to(tl.float32), 0)
            total = total * fade + tl.sum(share, 0)
            most = higher
    tl.store(out + head * HEAD + mine, (mixed / total).to(out.dtype.element_ty))


@triton.jit
def _gate(gate_up, out, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    _start(EARLY)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + place, mask=place < size, other=0).to(tl.float32)
    up = tl.load(gate_up + size + place, mask=place < size, other=0).to(tl.float32)
    tl.store(out + place, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, token, position, size, length, SIZE: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    _start(EARLY)
    place = tl.arange(0, SIZE)
    found = tl.load(logits + place, mask=place < size, other=float("-inf")).to(tl.float32)
    tl.store(token, tl.argmax(found, 0).to(tl.int64))
    tl.store(position, (tl.load(position) + 1) % length)


def add_norm(
    x: Tensor, weight: Tensor, delta: Tensor | None = None, token: Tensor | None = None, early: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x + delta (or row `token` of x) [1, size] and its RMS norm."""
    size = x.shape[-1]
    out, normed = torch.empty_like(x[:1]), torch.empty_like(x[:1])
    _add_norm[(1,)](
        x, x if token is None else token, x if delta is None else delta, weight, out, normed, size,
        HAS_TOKEN=token is not None, HAS_DELTA=delta is not None, SIZE=triton.next_power_of_2(size), EARLY=early,
        num_warps=8, **_options(early),
    )  # fmt: skip
    return out, normed


def attention(
    qkv: Tensor, cache: Tensor, turns: tuple[Tensor, Tensor], position: Tensor, early: bool = False
) -> Tensor:
    """Return the mixed values of all heads [1, hidden]; store rotated key and value in `cache` [2, heads, length, head]."""
    _, num_heads, length, head = cache.shape
    out = torch.empty(1, num_heads * head, dtype=qkv.dtype, device=qkv.device)
    part = min(HEAD_SLICE, head)
    _attention[(num_heads * head // part,)](
        qkv, cache, *turns, position, out, num_heads, LENGTH=length, HALF=head // 2, SLICE=part, POSITIONS=64,
        EARLY=early, num_warps=8, **_options(early),
    )  # fmt: skip
    return out


def gate(gate_up: Tensor, early: bool = False) -> Tensor:
    """Return silu(first half) * second half."""
    size = gate_up.shape[-1] // 2
    out = torch.empty(1, size, dtype=gate_up.dtype, device=gate_up.device)
    _gate[(triton.cdiv(size, 512),)](gate_up, out, size, BLOCK=512, EARLY=early, num_warps=4, **_options(early))
    return out


def choose_(logits: Tensor, token: Tensor, position: Tensor, length: int, early: bool = False) -> None:
    """Write the index of the largest logit into `token`, and advance `position`."""
    size = logits.shape[-1]
    _choose[(1,)](
        logits, token, position, size, length, SIZE=triton.next_power_of_2(size), EARLY=early, num_warps=16,
        **_options(early),
    )  # fmt: skip


def _options(early: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if early else {}
