"""Patterns of pruned weights: anywhere, N:M, which keeps at most N of every M consecutive inputs of a neuron, or whole blocks.

Hardware for sparse matrices reads N:M along the input dimension: 2:4 on NVIDIA's (arXiv 2104.08378). Kernels for block-sparse
matrices keep or skip blocks of R outputs x C inputs. This needs only the standard library; `sparsity.event`
applies a pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparsity.arguments import check_whole

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class NofM:
    """At most `kept` of every `block` consecutive weights of a row remain; blocks begin at multiples of `block`."""

    kept: int
    block: int

    def __post_init__(self) -> None:
        for name, example in (("kept", 2), ("block", 4)):
            check_whole(name, getattr(self, name), example)
        if not 1 <= self.kept < self.block:
            raise ValueError(
                f"NofM({self.kept}, {self.block}) keeps no part of a block: give N:M with N below M, NofM(2, 4)."
            )

    def __str__(self) -> str:
        return f"{self.kept}:{self.block}"

    @property
    def name(self) -> str:
        """The pattern as settings give it, such as 2:4."""
        return str(self)

    @property
    def label(self) -> str:
        """The pattern's description in cards and plots."""
        return f"{self} along the inputs"

    @property
    def sparsity(self) -> float:
        """The share of pruned weights when the pattern is complete."""
        return 1 - self.kept / self.block

    def whole(self, count: int) -> int:
        """Return the number of weights to prune if a schedule asks for `count`: as many."""
        return count

    def num_candidates(self, numel: int) -> int:
        """Return how many of `numel` weights, a whole number of blocks, the pattern allows to prune."""
        return numel // self.block * (self.block - self.kept)

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError unless the inputs, the last dimension of [out, in] or [expert, out, in], are whole blocks."""
        if len(shape) not in (2, 3) or shape[-1] % self.block:
            raise ValueError(
                f"pattern={self} needs weights [out, in] with a multiple of {self.block} inputs, and {name} has the shape "
                f"{list(shape)}: name it in requires_dense, or take another pattern."
            )

    def check_sparsity(self, sparsity: float) -> None:
        """Raise a ValueError unless a schedule's final sparsity is the pattern's, or 0 for weights that stay dense."""
        if sparsity and not math.isclose(sparsity, self.sparsity, abs_tol=1e-12):
            raise ValueError(
                f"pattern={self} ends at a sparsity of {self.sparsity:g}, not {sparsity:g}: set the target to "
                f"{self.sparsity!r}, or choose another pattern."
            )


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` outputs x `columns` inputs of a weight [out, in] are kept or pruned as a whole.

    They are those of torch's BSR layout, and begin at multiples of their size in both dimensions.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        for name, example in (("rows", 4), ("columns", 1)):
            check_whole(name, getattr(self, name), example)
        if min(self.rows, self.columns) < 1 or self.numel < 2:
            raise ValueError(
                f"Blocks({self.rows}, {self.columns}) has no two weights: give outputs and inputs, Blocks(4, 1)."
            )

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def name(self) -> str:
        """The pattern as settings give it."""
        return str(self)

    @property
    def label(self) -> str:
        """The pattern's description in cards and plots."""
        return f"in blocks of {self.rows} outputs x {self.columns} inputs"

    @property
    def numel(self) -> int:
        """The number of weights of a block."""
        return self.rows * self.columns

    def whole(self, count: int) -> int:
        """Return the multiple of a block's size that is nearest to `count` weights."""
        return round(count / self.numel) * self.numel

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError unless [out, in], or each matrix of [expert, out, in], is whole blocks."""
        if len(shape) not in (2, 3) or shape[-2] % self.rows or shape[-1] % self.columns:
            raise ValueError(
                f"pattern={self} needs weights [out, in] with a multiple of {self.rows} outputs and of {self.columns} inputs, "
                f"and {name} has the shape {list(shape)}: name it in requires_dense, or take another pattern."
            )

    def check_shards(self, name: str, shape: Sequence[int], num_ranks: int) -> None:
        """Raise a ValueError unless the shards of a weight, equal numbers of whole rows, are whole blocks.

        Args:
            name: The weight's name.
            shape: Its shape, [out, in] or [expert, out, in].
            num_ranks: How many ranks its first dimension is shared out to.
        """
        rows = -(-shape[0] // num_ranks)
        if len(shape) == 2 and num_ranks > 1 and rows % self.rows:
            raise ValueError(
                f"pattern={self} needs each block on one rank, and FSDP2 shares the {shape[0]} outputs of {name} out to "
                f"{num_ranks} ranks by {rows}: take a number of ranks that gives each a multiple of {self.rows}, or replicas "
                f"(launch.num_replicas), or pattern=1x{self.numel}."
            )

    def check_sparsity(self, sparsity: float) -> None:
        """Accept any final sparsity."""


Pattern = NofM | Blocks


def find_pattern(choice: str | Pattern | None) -> Pattern | None:
    """Return the pattern that `choice` names, or `choice` itself if it is one; None is unstructured.

    Raises:
        ValueError: The name is unknown, or `choice` is neither a name nor a pattern.
    """
    if choice is None or isinstance(choice, NofM | Blocks):
        return choice
    if not isinstance(choice, str):
        raise ValueError(
            f"pattern={choice!r} is no pattern: give its name, such as '2:4' or '4x1', or an instance, NofM(2, 4)."
        )
    return parse_pattern(choice)


def parse_pattern(text: str) -> Pattern | None:
    """Return None for "unstructured", NofM(2, 4) for "2:4" and Blocks(4, 1) for "4x1"; raise a ValueError for other text."""
    if text == UNSTRUCTURED:
        return None
    blocks = re.fullmatch(r"(\d+)x(\d+)", text)
    if blocks is not None and int(blocks[1]) * int(blocks[2]) > 1:
        return Blocks(int(blocks[1]), int(blocks[2]))
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) < int(found[2]):
        quotes = " (in yaml it needs quotes: YAML reads a bare 2:4 as 124)" if text.isdigit() else ""
        raise ValueError(
            f"pattern={text} is not known{quotes}: choose {UNSTRUCTURED}, N:M with N below M, like '2:4', or blocks "
            "of outputs x inputs, like 4x1."
        )
    return NofM(int(found[1]), int(found[2]))
