"""Attention by document on a GPU: the flash kernel for several lengths against a mask in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.data.collate import document_ends
from train.model.attention import attend_by_document

LENGTHS = [[1, 69, 442], [512], [300, 1, 211]]
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


def oracle(states: list[Tensor], window: int | None) -> Tensor:
    """Compute attention [batch, length, heads, width] in float64 on the CPU."""
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    documents = (POSITIONS == 0).cumsum(-1)
    distance = POSITIONS[:, :, None] - POSITIONS[:, None]
    mask = (documents[:, :, None] == documents[:, None]) & (distance >= 0) & (distance < (window or 512))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=0.1).transpose(1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize(("width", "kv_heads"), [(64, 4), (152, 4), (256, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-4)])
def test_a_document_in_a_block_gets_what_it_gets_alone(window, width, kv_heads, dtype, tolerance):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, 512, width) for heads in (4, kv_heads, kv_heads, 4)]
    query, key, value, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    states = [part.to(device).requires_grad_() for part in (query, key, value)]
    exact = [part.double().requires_grad_() for part in (query, key, value)]
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    ends = document_ends(POSITIONS).to(device)
    found, _ = attend_by_document(layer, *states, None, scaling=0.1, cu_seq_lens_q=ends, sliding_window=window)
    wanted = oracle(exact, window)
    weight = weight.transpose(1, 2)
    mine = [found, *torch.autograd.grad((found * weight.to(device)).sum(), states)]
    theirs = [wanted, *torch.autograd.grad((wanted * weight.double()).sum(), exact)]
    for some, right in zip(mine, theirs, strict=True):
        assert float((some.detach().cpu().double() - right.detach()).abs().max()) < tolerance * float(right.abs().max())
