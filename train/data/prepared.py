"""Prepared data: where the tokens of a run are, and how many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitCounts:
    """The size of the training or the held-out split."""

    num_documents: int
    num_tokens: int
    """The number of tokens, including bos and eos."""
    num_bytes: int
    """The UTF-8 bytes of the text whose tokens were kept; 0 for training tokens that another tool wrote."""


@dataclass(frozen=True)
class PreparedSource:
    """One source of a mixture, or a run's only source."""

    name: str
    weight: float
    folder: str
    train: SplitCounts
    heldout: SplitCounts


@dataclass(frozen=True)
class PreparedData:
    """The place of the tokens and their counts, as plain data that can be sent to other ranks."""

    folder: str
    tokenizer: str
    """The tokenizer's transformers folder."""
    vocab_size: int
    """One more than the tokenizer's largest id."""
    separator: int
    """The id that ends a document. A text is scored as if one came before it."""
    sequence_length: int
    train: SplitCounts
    heldout: SplitCounts
    bos: int | None = None
    """The id that begins every document, or None."""
    by_document: bool = False
    """True if a document is read and scored without the documents before it in its block: data.attention=document."""
    sources: tuple[PreparedSource, ...] = ()
    """The sources of a mixture; empty for a single source."""

    @property
    def num_blocks(self) -> int:
        """The number of training blocks of `sequence_length` tokens."""
        return self.train.num_tokens // self.sequence_length
