"""FSDP2 for a LLaMA, set up by hand in the same way as in a run."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard(
    model: Any,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    root: nn.Module | None = None,
    reshard: bool = True,
    tail: bool = True,
) -> None:
    """Put a model under FSDP2 over all ranks, or over this process alone, in the units that accelerate makes.

    The units are each block, the embedding, and with `tail` the final norm together with lm_head; without it these two
    belong to the root. `root` is the module that is called, if it is not the model. `reshard` frees a unit's weights after
    its forward pass. Gradients are summed in float32.
    """
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **alone)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
    for block in model.model.layers:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model.model.embed_tokens, reshard_after_forward=reshard, **options)
    if tail:
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    fully_shard(root or model, **options)
