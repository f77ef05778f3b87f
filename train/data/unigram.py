"""A baseline that every language model should beat: a guess of each token by its frequency in the training data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.index import COUNTS
from train.data.stream import TokenStream

if TYPE_CHECKING:
    from train.data.prepared import PreparedData

CHUNK = 1 << 24


def unigram_bits(counts: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> float:
    """Return the bits that encode `tokens` with p(id) = (counts[id] + 1) / (sum of counts + number of ids)."""
    bits = math.log2(int(counts.sum()) + len(counts)) - np.log2(counts + 1.0)
    return float(np.bincount(tokens, minlength=len(counts)) @ bits)


def unigram_bits_per_byte(prepared: PreparedData) -> float:
    """Return bits per UTF-8 byte of held-out text under the add-one-smoothed unigram model of the training tokens.

    Every token of the held-out stream is scored, including separators.
    """
    counts = np.load(Path(prepared.folder, COUNTS))
    stream = TokenStream(prepared.folder, "heldout")
    spans = range(0, len(stream), CHUNK)
    return sum(unigram_bits(counts, stream[start : start + CHUNK]) for start in spans) / prepared.heldout.num_bytes
