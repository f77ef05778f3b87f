"""From text to blocks of tokens: documents, split, tokenizer, packed streams, and the order of training.

Names are imported on first use (PEP 562), so that the worker processes that tokenize do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.pipeline import prepare
    from train.data.prepared import PreparedData, SplitCounts
    from train.data.sampler import PermutationSampler
    from train.data.stream import Blocks, TokenStream, heldout_starts, heldout_tokens, training_blocks
    from train.data.tokenizer import load_tokenizer
    from train.data.unigram import unigram_bits_per_byte

__all__ = [
    "Blocks",
    "PermutationSampler",
    "PreparedData",
    "SplitCounts",
    "TokenStream",
    "heldout_starts",
    "heldout_tokens",
    "load_tokenizer",
    "prepare",
    "training_blocks",
    "unigram_bits_per_byte",
]

_HOME = {
    "Blocks": "stream",
    "PermutationSampler": "sampler",
    "PreparedData": "prepared",
    "SplitCounts": "prepared",
    "TokenStream": "stream",
    "heldout_starts": "stream",
    "heldout_tokens": "stream",
    "load_tokenizer": "tokenizer",
    "prepare": "pipeline",
    "training_blocks": "stream",
    "unigram_bits_per_byte": "unigram",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
