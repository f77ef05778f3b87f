"""Masks on weights, gradients and optimizer moments: pruned weights are exactly 0 and stay 0.

If a weight, its gradient and both moments are zero, an AdamW update with decay leaves the weight at exactly 0.0. Zeros are
written, never computed as a product of the value and the mask, which would leave -0.0 and keep NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsity.devices import kernels_for
from sparsity.shards import ParameterShard, RankLayout, local_tensor, local_values, shard_offset, to_device

_AS_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def make_shards(parameters: dict[str, Tensor]) -> list[ParameterShard]:
    """Return the local shard of each parameter with a mask that keeps everything: one byte for each local weight."""
    shards = []
    for name, param in parameters.items():
        check_can_prune(name, param)
        values = local_values(param)
        mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
        shards.append(ParameterShard(name, values, mask, shard_offset(param), param.numel(), tuple(param.shape)))
    return shards


def check_can_prune(name: str, param: Tensor) -> None:
    """Raise a ValueError if selection cannot read a parameter.

    Selection reads contiguous tensors of float32, bfloat16 or float16.
    """
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is {str(param.dtype).removeprefix('torch.')}: magnitudes are compared as float32, bfloat16 or "
            "float16; convert it, or name it in requires_dense."
        )
    if not local_tensor(param.detach()).is_contiguous():
        raise ValueError(f"{name} is not contiguous in memory: make it so, or name it in requires_dense.")


@torch.no_grad()
def zero_pruned_(tensor: Tensor, mask: Tensor) -> None:
    """Write 0 into the elements of `tensor` (any shape, plain or DTensor) for which the flat local `mask` is False."""
    local = local_tensor(tensor)
    mask = mask.view(local.shape)
    if (launches := kernels_for(local.device)) is not None and launches.can_zero(local):
        launches.zero_(local, mask.view(-1))
    elif local.device.type == "cpu" and local.dtype in _AS_BITS and local.is_contiguous():
        # A product of integers keeps all bits or none. In torch, `where` branches at each weight, and a product of two
        # types copies the mask first.
        bits, kept = local.view(_AS_BITS[local.dtype]).numpy(), mask.view(torch.int8).numpy()
        np.multiply(bits, kept, out=bits)
    else:
        # In place: an inverted mask for masked_fill_ would take another byte for each weight.
        torch.where(mask, local, local.new_zeros(()), out=local)


@torch.no_grad()
def zero_all_pruned_(masked: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> None:
    """Apply `zero_pruned_` to many tensors, grouped by mask; on a GPU one kernel writes all tensors of a type."""
    at_once: list[tuple[Tensor, list[Tensor]]] = []
    for mask, tensors in masked:
        launches = kernels_for(mask.device)
        ready = []
        for tensor in tensors:
            local = local_tensor(tensor)
            if launches is not None and launches.can_zero(local) and local.numel() == mask.numel():
                ready.append(local)
            else:
                zero_pruned_(tensor, mask)
        if ready:
            at_once.append((mask, ready))
    if at_once:
        kernels_for(at_once[0][0].device).zero_all_(at_once)  # type: ignore[union-attr]


def states_of(optimizer: torch.optim.Optimizer, param: Tensor) -> list[Tensor]:
    """Return every state of `param` that has its shape, such as Adam's two moments or a momentum buffer."""
    return [
        state
        for state in optimizer.state.get(param, {}).values()
        if isinstance(state, Tensor) and state.shape == param.shape and state.is_floating_point()
    ]


def flat_states_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Return flat views [local numel] of the states that have the shape of `param`, by name."""
    return {
        name: local_values(state)
        for name, state in optimizer.state.get(param, {}).items()
        if isinstance(state, Tensor) and state.shape == param.shape and state.is_floating_point()
    }


def zero_pruned_state_(optimizer: torch.optim.Optimizer, param: Tensor, mask: Tensor) -> None:
    """Write 0 into every state of `param` wherever the mask is False."""
    zero_all_pruned_([(mask, states_of(optimizer, param))])


def leaves_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an update keeps a weight at exactly 0 if its gradient and states are 0.

    Adam and AdamW do: w (1 - lr decay) - lr 0 / (sqrt(0) + eps). They do not if eps is 0, and the usual eps rounds to 0 in
    float16. For all other optimizers the answer is False; some, like Muon, mix weights.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    return all(
        group["eps"] > 0 and all(param.dtype in (torch.float32, torch.bfloat16) for param in group["params"])
        for group in optimizer.param_groups
    )


def count_mask(shards: Sequence[ParameterShard]) -> Tensor:
    """Count the kept weights of each local shard, int64 [shards]."""
    if (launches := kernels_for(shards[0].mask.device)) is not None:
        counts: Tensor = launches.count_kept(shards)
        return counts
    return torch.stack([torch.count_nonzero(shard.mask) for shard in shards])


def count_kept(shards: Sequence[ParameterShard], layout: RankLayout) -> Tensor:
    """Count the kept weights of each full parameter, int64 [shards], without waiting for the device.

    Collective: over the shard group.
    """
    return layout.sum_counts(count_mask(shards))


def count_nonzero_pruned(shards: Sequence[ParameterShard], layout: RankLayout) -> int:
    """Count the weights that the masks prune but that are not 0, over all shards.

    Collective: over the shard group.
    """
    counts = [torch.count_nonzero(shard.values.masked_fill(shard.mask, 0)) for shard in shards]
    return int(layout.sum_counts(torch.stack(counts).sum()))


def masks_from_zeros(shards: Sequence[ParameterShard]) -> None:
    """Set the masks from the weights: every exact 0 is pruned."""
    for shard in shards:
        torch.ne(shard.values, 0, out=shard.mask)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask [n] into bits, uint8 [ceil(n / 8)] on the CPU; weight i is bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_mask(bits: Tensor, start: int, stop: int) -> Tensor:
    """Unpack the mask of the weights start .. stop, bool [stop - start]; `bits` begins with the byte of weight `start`."""
    unpacked = np.unpackbits(bits.numpy(), bitorder="little").view(bool)
    return torch.from_numpy(unpacked[start % 8 : start % 8 + stop - start])


def mask_hash(shards: Sequence[ParameterShard]) -> int:
    """Return a 64-bit hash of the local masks; equal masks have equal hashes on devices of the same kind."""
    device = shards[0].mask.device
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (4096,), generator=generator).to(device, non_blocking=True)
    digest = torch.zeros((), dtype=torch.int64, device=device)
    launches = kernels_for(device)
    # One kernel reduces all shards' masks to a word for each block; these words are hashed like a mask's own.
    masks = [_as_words(shard.mask) for shard in shards] if launches is None else [launches.digests(shards, factors)]
    for words in masks:
        while words.numel() > 1:
            rows = -(-words.numel() // factors.numel())
            padded = torch.zeros(rows * factors.numel(), dtype=torch.int64, device=device)
            padded[: words.numel()] = words
            words = (padded.view(rows, -1) * factors | 1).sum(dim=1) ^ rows
        digest = digest * 6364136223846793005 + words.sum()
    return int(digest)


def check_replicas_agree(shards: Sequence[ParameterShard], layout: RankLayout) -> None:
    """Raise a RuntimeError if ranks that hold the same shard have different masks.

    Collective: over the replica groups.
    """
    if not layout.replica_groups:
        return
    mine = mask_hash(shards)
    for group in layout.replica_groups:
        bounds = to_device([mine, ~mine], shards[0].mask.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        largest, inverse = bounds.tolist()
        smallest = ~inverse
        if largest != smallest:
            raise RuntimeError(
                f"Replicas disagree on their masks (rank {dist.get_rank()} has hash {mine:x}, others between {smallest:x} "
                f"and {largest:x}): their weights differ, so the run cannot be trusted; restart from a checkpoint."
            )


def _as_words(mask: Tensor) -> Tensor:
    words = -(-mask.numel() // 8)
    padded = torch.zeros(words * 8, dtype=torch.uint8, device=mask.device)
    padded[: mask.numel()] = mask
    return padded.view(torch.int64)


def state_holder(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
