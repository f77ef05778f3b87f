"""Patterns of pruned weights: anywhere, or N:M, which keeps at most N of every M consecutive inputs of a neuron.

Hardware for sparse matrices reads N:M along the input dimension: 2:4 on NVIDIA's (arXiv 2104.08378). This needs only the
standard library; `sparsity.event` applies a pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class NofM:
    """At most `kept` of every `block` consecutive weights of a row remain; blocks begin at multiples of `block`."""

    kept: int
    block: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.block}"

    @property
    def name(self) -> str:
        return str(self)

    @property
    def label(self) -> str:
        return f"{self} along the inputs"

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.block

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


def parse_pattern(text: str) -> NofM | None:
    """Return None for "unstructured" and NofM(2, 4) for "2:4"; raise a ValueError for other text."""
    if text == UNSTRUCTURED:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) < int(found[2]):
        quotes = " (in yaml it needs quotes: YAML reads a bare 2:4 as 124)" if text.isdigit() else ""
        raise ValueError(
            f"pattern={text} is not known{quotes}: choose {UNSTRUCTURED}, or N:M with N below M, like '2:4'."
        )
    return NofM(int(found[1]), int(found[2]))
