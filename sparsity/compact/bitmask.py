"""Conversion of a tensor to a bitmask and its kept items, and back, block by block.

Only bits are looked at, never values: an item counts as pruned only if all of its bits are zero. -0.0, NaN payloads and
denormals are therefore kept, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sparsity.mask import pack_mask, unpack_mask

# A multiple of 64, so that the masks of blocks join without shifting, and small enough for a core's cache.
BLOCK = 1 << 18
_BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitmask_bytes(numel: int) -> int:
    """Return the bytes of a bitmask: whole 64-bit words, so that data after a mask in a file stays aligned."""
    return 8 * -(-numel // 64)


def compress(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bitmask, uint8 [bitmask_bytes(n)], and the kept items of `items`, unsigned integers [n]."""
    kept = items != 0
    bits = np.zeros(bitmask_bytes(items.size), np.uint8)
    packed = pack_mask(torch.from_numpy(kept)).numpy()
    bits[: packed.size] = packed
    return bits, items.take(np.flatnonzero(kept))


def expand(bitmask: np.ndarray, kept: np.ndarray, numel: int) -> Iterator[np.ndarray]:
    """Yield the `numel` items in blocks; raise a ValueError if the mask does not keep exactly `kept.size` of them."""
    position = 0
    for places, size in _places(bitmask, numel):
        if position + places.size > kept.size:
            break
        block = np.zeros(size, kept.dtype)
        block[places] = kept[position : position + places.size]
        position += places.size
        yield block
    check_bitmask(bitmask, numel, kept.size)


def check_bitmask(bitmask: np.ndarray, numel: int, num_kept: int) -> None:
    """Raise a ValueError unless exactly `num_kept` bits are set, all of them below `numel`."""
    if bitmask.size != bitmask_bytes(numel):
        raise ValueError(f"a bitmask of {bitmask.size} bytes is not of {numel} weights ({bitmask_bytes(numel)} bytes)")
    found = sum(
        int(np.count_nonzero(np.unpackbits(bitmask[start : start + BLOCK]))) for start in range(0, bitmask.size, BLOCK)
    )
    if found != num_kept:
        raise ValueError(f"the bitmask keeps {found} weights and {num_kept} are stored")
    last = np.unpackbits(bitmask[-8:], bitorder="little")
    if last[last.size - (8 * bitmask.size - numel) :].any():
        raise ValueError(f"the bitmask keeps weights beyond the last of {numel}")


def expand_tensor(bitmask: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
    """Return the dense tensor of `shape` on the device of `kept`.

    Raises:
        ValueError: The mask, the number of kept values and the shape do not agree.
    """
    numel = shape.numel()
    if bitmask.numel() != bitmask_bytes(numel):
        raise ValueError(f"a bitmask of {bitmask.numel()} bytes is not of a tensor of shape {tuple(shape)}")
    if kept.device.type != "cpu":
        return expand_on_device(bitmask, kept, numel).view(shape)
    out = torch.empty(numel, dtype=kept.dtype)
    bits = _BITS_OF_SIZE[kept.element_size()]
    flat, start = out.view(bits).numpy(), 0
    for block in expand(bitmask.numpy(), kept.view(bits).numpy(), numel):
        flat[start : start + block.size] = block
        start += block.size
    return out.view(shape)


def expand_on_device(bitmask: Tensor, kept: Tensor, numel: int) -> Tensor:
    """Return the `numel` items on the device of `kept`.

    Blocks are larger than those of `expand`, because each one costs a device synchronization.

    Raises:
        ValueError: The mask does not keep exactly the values in `kept`, or keeps weights beyond the last.
    """
    out = torch.zeros(numel, dtype=kept.dtype, device=kept.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    position, size = 0, BLOCK << 6
    for start in range(0, 8 * bitmask.numel(), size):
        words = bitmask[start // 8 : (start + size) // 8]
        places = torch.nonzero(((words[:, None] >> shifts) & 1).view(-1)).view(-1) + start
        stop = position + places.numel()
        if stop > kept.numel() or (places.numel() > 0 and int(places[-1]) >= numel):
            raise ValueError(f"the bitmask keeps more weights than the {kept.numel()} of {numel} that are stored")
        out[places] = kept[position:stop]
        position = stop
    if position != kept.numel():
        raise ValueError(f"the bitmask keeps {position} weights and {kept.numel()} are stored")
    return out


def _places(bitmask: np.ndarray, numel: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the places of the kept items in each block, and the block's size."""
    for start in range(0, numel, BLOCK):
        size = min(BLOCK, numel - start)
        bits = torch.from_numpy(bitmask[start // 8 : -(-(start + size) // 8)])
        yield np.flatnonzero(unpack_mask(bits, 0, size).numpy()), size
