"""A LLaMA with random weights that decodes one token after another: the model of `tests.benchmarks.decode`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.compact.linear import SparseLinear
from tests.benchmarks.event import Size

CACHE_LENGTH = 256


class Block(nn.Module):
    """A decoder block for one token, with a cache of fixed length; projections that share their input are one layer."""

    def __init__(self, size: Size, head: int, **kwargs: Any) -> None:
        super().__init__()
        hidden, self.heads, self.head = size.hidden, size.hidden // head, head
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, **kwargs)
        self.out = nn.Linear(hidden, hidden, bias=False, **kwargs)
        self.gate_up = nn.Linear(hidden, 2 * size.mlp, bias=False, **kwargs)
        self.down = nn.Linear(size.mlp, hidden, bias=False, **kwargs)
        self.register_buffer("norms", torch.ones(2, hidden, **kwargs))
        self.register_buffer("cache", torch.zeros(2, self.heads, CACHE_LENGTH, head, **kwargs))

    def forward(self, x: Tensor, position: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        found = self.qkv(F.rms_norm(x, x.shape[-1:], self.norms[0], 1e-5)).view(3, self.heads, 1, self.head)
        rotated = found[:2] * turn[0] + found[:2].view(2, self.heads, 1, 2, -1).flip(-2).view_as(found[:2]) * turn[1]
        self.cache[0].index_copy_(1, position, rotated[1])
        self.cache[1].index_copy_(1, position, found[2])
        mixed = F.scaled_dot_product_attention(rotated[0][None], self.cache[0][None], self.cache[1][None], mask)
        x = x + self.out(mixed.reshape(1, -1))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.norms[1], 1e-5)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def fused(
        self,
        x: Tensor,
        normed: Tensor,
        position: Tensor,
        turns: tuple[Tensor, Tensor],
        kernels: ModuleType,
        early: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run `forward` as the products and three kernels: take x and its norm, return x and the delta to add to it."""
        mixed = kernels.attention(self.qkv(normed), self.cache, turns, position, early)
        x, normed = kernels.add_norm(x, self.norms[1], self.out(mixed), early=early)
        return x, self.down(kernels.gate(self.gate_up(normed), early))


class Decoder(nn.Module):
    """A LLaMA with random weights whose step goes from its last token to the next without a read by the host."""

    def __init__(self, size: Size, head: int, device: str) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.embedding = nn.Embedding(size.vocabulary, size.hidden, **kwargs)
        self.blocks = nn.ModuleList(Block(size, head, **kwargs) for _ in range(size.layers))
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False, **kwargs)
        self.register_buffer("norm", torch.ones(size.hidden, **kwargs))
        angles = torch.arange(CACHE_LENGTH)[:, None] / 10_000 ** (torch.arange(0, head, 2) / head)
        for name, values in (("cosines", [angles.cos()] * 2), ("sines", [-angles.sin(), angles.sin()])):
            self.register_buffer(name, torch.cat(values, -1).to(**kwargs))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("token", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("places", torch.arange(CACHE_LENGTH, device=device))

    def step(self) -> None:
        mask = torch.zeros(CACHE_LENGTH, dtype=self.norm.dtype, device=self.norm.device)
        mask = mask.masked_fill_(self.places > self.position, -torch.inf)[None, None, None]
        turn = self.cosines[self.position], self.sines[self.position]
        x = self.embedding(self.token)
        for block in self.blocks:
            x = block(x, self.position, turn, mask)
        logits = self.lm_head(F.rms_norm(x, x.shape[-1:], self.norm, 1e-5))
        self.token.copy_(logits.argmax(-1))
        self.position.copy_((self.position + 1) % CACHE_LENGTH)

    def fused_step(self, kernels: ModuleType, early: bool = False) -> None:
        """Run `step` with its small operations in the kernels of `tests.benchmarks.decode_kernels`."""
        turns = self.cosines, self.sines
        x, normed = kernels.add_norm(self.embedding.weight, self.blocks[0].norms[0], token=self.token, early=early)
        for number, block in enumerate(self.blocks):
            x, delta = block.fused(x, normed, self.position, turns, kernels, early)
            is_last = number + 1 == len(self.blocks)
            x, normed = kernels.add_norm(
                x, self.norm if is_last else self.blocks[number + 1].norms[0], delta, early=early
            )
        kernels.choose_(self.lm_head(normed), self.token, self.position, CACHE_LENGTH, early)

    def start_anew(self) -> None:
        self.position.zero_()
        self.token.zero_()

    def linear_calls(self) -> list[Callable[[], Any]]:
        """Return a call of each linear layer, in order, on an input of the layer's size."""
        found = [m for m in self.modules() if isinstance(m, (nn.Linear, SparseLinear))]
        inputs = {
            n: torch.randn(1, n, device=self.norm.device).to(self.norm.dtype) for n in {m.in_features for m in found}
        }
        return [lambda m=m: m(inputs[m.in_features]) for m in found]  # type: ignore[misc]


@torch.no_grad()
def make_sparse_(model: nn.Module, density: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.masked_fill_(torch.rand_like(module.weight, dtype=torch.float32) >= density, 0)
