"""Attention within documents on a GPU: the flash kernel for several lengths against SDPA with a mask on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.data.collate import document_ends
from train.data.stream import positions_within
from train.model.attention import attend_by_document

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "inductor" if torch.cuda.is_available() else "eager"
ROWS, LENGTH, HEADS = 3, 64, 2
STARTS = ([0, 10, 11, 50], [5], [0, 63])


def ends() -> Tensor:
    positions = [positions_within(torch.tensor(starts).numpy(), LENGTH) for starts in STARTS]
    return document_ends(torch.stack(positions))


def attended(
    states: list[Tensor], ends: Tensor, attend: Callable[..., Any] = attend_by_document
) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and the gradients of its sum of squares to query, key and value, in float32 on the CPU."""
    leaves = [state.detach().requires_grad_() for state in states]
    found, _ = attend(nn.Module(), *leaves, None, cu_seq_lens_q=ends)
    found.float().square().sum().backward()
    return found.detach().float().cpu(), [leaf.grad.float().cpu() for leaf in leaves]


@pytest.mark.parametrize("width", [64, 44, 6])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_the_flash_kernel_attends_within_documents_at_any_head_size(width, is_compiled):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(ROWS, HEADS, LENGTH, width, generator=generator).bfloat16() for _ in range(3)]
    expected, expected_gradients = attended([state.float() for state in states], ends())
    attend = torch.compile(attend_by_document, backend=BACKEND) if is_compiled else attend_by_document
    found, gradients = attended([state.to(DEVICE) for state in states], ends().to(DEVICE), attend)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=6e-2, rtol=6e-2)
