"""Gradient clipping by a norm that is the same number on every rank.

Under HSDP each replica sums the squares of its own shards, in an order that depends on its network. The same floats summed
in another order differ in the last bit about half of the time. Replicas that scale the same gradient by different factors
drift apart, until their masks disagree. Therefore all ranks use the norm that one rank computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def has_replicas(parameters: Iterable[Tensor]) -> bool:
    """Return whether a parameter is sharded and held by several replicas, as under HSDP."""
    return any(
        isinstance(param, DTensor)
        and any(
            placement.is_replicate() and param.device_mesh.size(dim) > 1
            for dim, placement in enumerate(param.placements)
        )
        for param in parameters
    )


def clip_replicas_alike_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`, by the same factor on every rank.

    Collective: all ranks of the world call it.

    Args:
        parameters: The model's parameters, all on one device mesh that spans the world.
        max_norm: The largest norm after clipping.

    Returns:
        The norm before clipping, as rank 0 summed it.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([param.grad for param in parameters if param.grad is not None])
    assert isinstance(norm, DTensor)
    mesh, whole = norm.device_mesh, norm.full_tensor()
    dist.broadcast(whole, src=0)
    shared = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, shared)
    return whole
