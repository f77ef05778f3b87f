"""Under bf16 the weights are gathered in bfloat16 and gradients are summed over ranks in float32."""

from __future__ import annotations

import os

import torch
from torch import nn

from tests.distributed import run_ranks


def summed_gradient() -> list[float]:
    """The gradient that two ranks' 1 and 2^-9 make: in bfloat16 their sum would be 1."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }  # fmt: skip
    from accelerate import Accelerator

    from train.distributed import join_world, reduce_in_float32

    world = join_world(60)
    accelerator = Accelerator()
    reduce_in_float32(accelerator)
    model = nn.Linear(1, 2, bias=False)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    scale = 1.0 if world.rank == 0 else 2.0**-9
    model(torch.ones(1, 1)).float().sum().mul(scale).backward()
    return model.weight.grad.full_tensor().view(-1).tolist()


def test_gradients_are_summed_over_ranks_in_float32():
    for gradient in run_ranks(summed_gradient, 2, joined=False):
        assert gradient == [(1.0 + 2.0**-9) / 2] * 2


def test_a_process_alone_has_nothing_to_reduce():
    from accelerate import Accelerator

    from train.distributed import reduce_in_float32

    reduce_in_float32(Accelerator(cpu=True))
