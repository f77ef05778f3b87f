"""Several sources mixed into one order of blocks: each has its share in every window, and is itself shuffled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from train.data.sampler import InOrder, permute, round_keys
from train.data.stream import Blocks, blocks_of

if TYPE_CHECKING:
    from train.data.prepared import PreparedData

WINDOW = 1000
"""The number of blocks in a window. In each window every source has its share, to within one block."""
GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio: the fractional parts of its first n multiples are spread evenly for every n."""


def window_counts(weights: Sequence[float], windows: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the number of blocks of each source in each of `windows` [windows, sources].

    A row sums to `WINDOW`, and each entry is the exact share rounded down or up. The sources are rounded up in turn, so
    that the shares over many windows are exact as well.
    """
    exact = WINDOW * np.asarray(weights, dtype=np.float64) / sum(weights)
    # A share that differs from a whole number only by rounding error is treated as that number.
    exact = np.where(abs(exact - exact.round()) < 1e-9, exact.round(), exact)
    whole = np.floor(exact)
    bounds = np.concatenate([[0.0], np.cumsum(exact - whole)])
    bounds[-1] = WINDOW - whole.sum()
    # Points with a distance of 1 are shifted a little with each window; a source gets one more block for each point that
    # is between its bounds.
    shift = (windows * GOLDEN) % 1.0
    points = np.ceil(bounds[None, :] - shift[:, None])
    return (whole + np.diff(points, axis=1)).astype(np.int64)


class MixedOrder:
    """The order of a mixture: the source of the block at each place, and its number among the source's blocks.

    Args:
        weights: The sources' shares, in any unit.
        num_blocks: The length of the order. A longer order begins like a shorter one.
        seed: The seed that shuffles the sources within a window.
    """

    def __init__(self, weights: Sequence[float], num_blocks: int, seed: int) -> None:
        self.num_blocks = num_blocks
        self.seed = seed
        self._counts = window_counts(weights, np.arange(-(-num_blocks // WINDOW)))
        before = np.zeros_like(self._counts[:1])
        self._before = np.concatenate([before, np.cumsum(self._counts, axis=0)])

    def source_at(self, place: int) -> tuple[int, int]:
        """Return (source, number of the block among that source's blocks, from 0) for a place in the order."""
        window, slot = divmod(place, WINDOW)
        sources = self._sources(window)
        source = int(sources[slot])
        return source, int(self._before[window, source]) + int((sources[:slot] == source).sum())

    def counts_before(self, place: int) -> NDArray[np.int64]:
        """Return the number of blocks of each source before a place [sources]."""
        window, slot = divmod(place, WINDOW)
        counts: NDArray[np.int64] = self._before[window].copy()
        if slot:
            counts += np.bincount(self._sources(window)[:slot], minlength=len(counts))
        return counts

    def _sources(self, window: int) -> NDArray[np.int64]:
        return _window_sources(self.seed, window, tuple(self._counts[window].tolist()))


@lru_cache(maxsize=4)
def _window_sources(seed: int, window: int, counts: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the source at each place of a window."""
    turns = permute(np.arange(WINDOW), WINDOW, round_keys(seed, window))
    return np.repeat(np.arange(len(counts)), counts)[turns]


class MixtureBlocks(Dataset[dict[str, torch.Tensor]]):
    """The blocks of several sources in the order of training: item i is the i-th block of the run.

    When all blocks of a source have been used, it repeats in a new order.

    Args:
        sources: The (name, weight, blocks) of each source.
        num_blocks: The number of blocks of the run.
        seed: The seed for the order of the mixture and of each source.
    """

    def __init__(self, sources: Sequence[tuple[str, float, Blocks]], num_blocks: int, seed: int) -> None:
        self.names = [name for name, _, _ in sources]
        self.blocks = [blocks for _, _, blocks in sources]
        self.seed = seed
        self.order = MixedOrder([weight for _, weight, _ in sources], num_blocks, seed)
        self._keys = list(range(len(sources)))
        """The number of each source in the keys of its order."""
        self._offsets = np.zeros(len(sources), dtype=np.int64)
        """The number that each source's first block in this order would have, as its blocks are counted over all runs."""
        self._others: dict[str, int] = {}
        """The blocks of sources that an earlier part of the run has used and this one does not."""

    def continue_from(self, place: int, taken: Mapping[str, int]) -> None:
        """Let each source continue after the blocks that a run has already taken from it by a place, as in a branch.

        Args:
            place: The number of blocks that the run has taken by then.
            taken: The number of blocks from each source by name, in the order of the sources' numbers. If it is empty, an
                earlier version recorded the branch, and this order is continued as that version did.
        """
        if not taken:
            return
        numbers = {name: number for number, name in enumerate([*taken, *(n for n in self.names if n not in taken)])}
        self._keys = [numbers[name] for name in self.names]
        before = np.array([taken.get(name, 0) for name in self.names], dtype=np.int64)
        self._offsets = before - self.order.counts_before(place)
        self._others = {name: count for name, count in taken.items() if name not in self.names}

    def __len__(self) -> int:
        return self.order.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is outside 0..{len(self) - 1}")
        source, number = self.order.source_at(index)
        return self.blocks[source][self.block_of(source, number + int(self._offsets[source]))]

    def block_of(self, source: int, number: int) -> int:
        """Return the index, in a source, of the block that is the `number`-th of all that are taken from it, from 0."""
        epoch, place = divmod(number, len(self.blocks[source]))
        # Sources of equal length must not be shuffled alike.
        keys = round_keys(self.seed, (epoch << 16) + self._keys[source] + 1)
        return int(permute([place], len(self.blocks[source]), keys)[0])

    def sampler(self, batch_size: int) -> InOrder:
        """Return the sampler that keeps this order."""
        return InOrder(len(self), batch_size=batch_size)

    def figures(self, num_blocks: int) -> dict[str, Any]:
        """Return tokens and epochs of each source after `num_blocks` blocks, under the names used in the records."""
        counts = (self.order.counts_before(num_blocks) + self._offsets).tolist()
        length = self.blocks[0].sequence_length
        found: dict[str, Any] = {f"tokens/{name}": count * length for name, count in self._others.items()}
        for name, blocks, count in zip(self.names, self.blocks, counts, strict=True):
            found[f"tokens/{name}"] = count * length
            found[f"epochs/{name}"] = count / len(blocks)
        return found


def mixture_blocks(prepared: PreparedData, num_blocks: int, seed: int) -> MixtureBlocks:
    """Return the blocks of a run on a mixture, in the order of training.

    Args:
        prepared: The prepared mixture.
        num_blocks: The number of blocks of the run.
        seed: The seed of their order.
    """
    sources = [(source.name, source.weight, blocks_of(prepared, source.folder)) for source in prepared.sources]
    return MixtureBlocks(sources, num_blocks, seed)
