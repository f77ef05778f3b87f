"""A new order of the training blocks in every epoch, computed from a few numbers instead of stored as a list."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

ROUNDS = 6
CHUNK = 1 << 16


def round_keys(seed: int, epoch: int) -> list[np.uint64]:
    """Return `ROUNDS` keys for `permute` that depend only on the two numbers, not on a global generator."""
    state = blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return [np.uint64(key) for key in np.frombuffer(state, "<u8")]


def permute(indices: npt.ArrayLike, num_items: int, keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply a pseudo-random permutation of 0..num_items-1 to some indices, without storing the permutation.

    A Feistel network permutes the numbers below the smallest power of four that is at least `num_items`. A value outside
    the range is permuted again until it is inside, which keeps the mapping a bijection (cycle walking, at most 4 rounds
    on average).

    Args:
        indices: The indices.
        num_items: The number of items.
        keys: The keys of the permutation, from `round_keys`.
    """
    half = np.uint64(max(1, (num_items - 1).bit_length() + 1 >> 1))
    values = np.array(indices, np.uint64, ndmin=1)
    waiting = np.arange(len(values))
    while len(waiting):
        values[waiting] = _feistel(values[waiting], half, keys)
        waiting = waiting[values[waiting] >= num_items]
    return values


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply the finalizer of splitmix64, which makes every bit of the result depend on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class PermutationSampler(Sampler[int]):
    """The blocks 0..num_blocks-1, each once, in an order determined by `seed` and the epoch.

    An epoch ends with its last whole batch of `batch_size` blocks; the remaining blocks are used in other epochs. So an
    epoch has the same steps for any number of processes and any micro-batch. Every rank creates the same sampler and
    takes its share of it.

    Args:
        num_blocks: The number of blocks.
        seed: The seed of the order.
        epoch: The first epoch.
        start: The number of positions to skip in that epoch, for a run that resumes in the middle of one.
        batch_size: The blocks in a step, over all ranks.
    """

    def __init__(self, num_blocks: int, seed: int = 0, *, epoch: int = 0, start: int = 0, batch_size: int = 1) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1: give more data.")
        if num_blocks < batch_size:
            raise ValueError(
                f"batch_size={batch_size} is larger than the number of training blocks, {num_blocks}: give more text or a "
                "smaller batch."
            )
        if not 0 <= start <= num_blocks:
            raise ValueError(f"start={start} is outside 0..{num_blocks}: give a position in the epoch.")
        self.num_blocks = num_blocks
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.num_taken = num_blocks // batch_size * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, in its own order; leave the position alone if it is the same one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def permute(self, position: int) -> int:
        """Return the block at a position of the epoch."""
        return int(permute([position], self.num_blocks, round_keys(self.seed, self.epoch))[0])

    def __len__(self) -> int:
        return max(0, self.num_taken - self.start)

    def __iter__(self) -> Iterator[int]:
        keys = round_keys(self.seed, self.epoch)
        for start in range(self.start, self.num_taken, CHUNK):
            positions = np.arange(start, min(start + CHUNK, self.num_taken), dtype=np.uint64)
            yield from permute(positions, self.num_blocks, keys).tolist()


class InOrder(PermutationSampler):
    """The blocks 0..num_blocks-1 in order, for a dataset that is already in the order of the run."""

    def permute(self, position: int) -> int:
        """Return the position itself."""
        return position

    def __iter__(self) -> Iterator[int]:
        yield from range(self.start, self.num_taken)
