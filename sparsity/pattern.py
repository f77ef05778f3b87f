"""Where weights may be pruned: anywhere, or N:M, at most N kept of every M consecutive inputs of a neuron.

N:M along the input dimension is what sparse matrix units read: 2:4 for NVIDIA's (arXiv 2104.08378). Only the standard
library is needed here; `sparsity.prune` applies a pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class NofM:
    """At most `kept` of the weights `block * b` .. `block * b + block - 1` of each row remain."""

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
        """How many of `numel` weights, whole blocks, the pattern lets go."""
        return numel // self.block * (self.block - self.kept)

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raise a ValueError if the input dimension has no whole number of blocks: the last of [out, in], [expert, out, in]."""
        if len(shape) not in (2, 3) or shape[-1] % self.block:
            raise ValueError(
                f"pattern={self} needs weights [out, in] with a multiple of {self.block} inputs, and {name} has the shape "
                f"{list(shape)}: name it in requires_dense, or take another pattern."
            )

    def check_sparsity(self, sparsity: float) -> None:
        """A ValueError where the schedule would end before or beyond the pattern; 0 leaves weights dense."""
        if sparsity and not math.isclose(sparsity, self.sparsity, abs_tol=1e-12):
            raise ValueError(
                f"pattern={self} ends at a sparsity of {self.sparsity:g}, not {sparsity:g}: set the target to "
                f"{self.sparsity!r}, or choose another pattern."
            )


def parse_pattern(text: str) -> NofM | None:
    """`unstructured` as None, "2:4" as NofM(2, 4); anything else is a ValueError."""
    if text == UNSTRUCTURED:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) < int(found[2]):
        quotes = " (in yaml it needs quotes: YAML reads a bare 2:4 as 124)" if text.isdigit() else ""
        raise ValueError(
            f"pattern={text} is not known{quotes}: choose {UNSTRUCTURED}, or N:M with N below M, like '2:4'."
        )
    return NofM(int(found[1]), int(found[2]))
