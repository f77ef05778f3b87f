"""The amount of text for the activation norms that a score asks for. Importing this needs no torch."""

from __future__ import annotations

from sparsity.arguments import check_whole
from sparsity.registry import name_of
from sparsity.score import Score

USUAL_SEQUENCES = 128
"""As many sequences as in Wanda's paper (arXiv 2306.11695)."""


def check_calibration(num_sequences: int, score: Score) -> None:
    """Raise a ValueError for a number of sequences that cannot be, or that has no effect."""
    check_whole("calibration", num_sequences, USUAL_SEQUENCES)
    if num_sequences < 1:
        raise ValueError(f"calibration={num_sequences} must be at least 1 sequence of the training data.")
    if num_sequences != USUAL_SEQUENCES and "activations" not in score.needs:
        raise ValueError(
            f"calibration={num_sequences} has no effect with score={name_of(score)}, which needs no activations: leave it at "
            f"{USUAL_SEQUENCES}, or take score=wanda."
        )
