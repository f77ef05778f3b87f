"""The group `data`: what it is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from conf.schema.checks import check, check_choice


@dataclass
class DataConfig:
    """Where the text comes from and how it is cut; see `train/data`."""

    source: str = MISSING
    path: str | None = None
    """A file or folder of .txt, .jsonl, .jsonl.gz or .parquet; for `fineweb_edu` a local copy of its parquet files, for
    `wikitext` its test file or any other text file. Links in a folder are followed, each file is read once, and names that
    begin with a dot are left out."""
    subset: str | None = None
    text_field: str = "text"
    heldout_share: float = 0.01
    """Share of the documents, picked by a hash of their text, that is never trained on."""
    sequence_length: int | None = None
    """Tokens in a block; the model's context where it is null."""
    bos: bool = False
    """Begin each document with the tokenizer's bos token."""
    eos: bool = True
    """End each document with the tokenizer's eos token, or with its bos token if it has no eos."""
    max_document_tokens: int | None = None
    """Cut documents after this many tokens, bos and eos included, and drop the rest of them; null keeps them whole."""
    attention: str = "causal"
    """`causal` attends over the whole block, also to the documents before; `document` only within a document."""
    max_documents: int | None = None
    num_workers: int | None = None
    """Processes that tokenize; all cores where it is null."""
    cache_dir: str = MISSING

    def __post_init__(self) -> None:
        check_choice("data.source", self.source, ("pydocs", "text", "fineweb_edu", "wikitext"))
        check(
            0 < self.heldout_share < 1,
            f"data.heldout_share={self.heldout_share} is outside (0, 1): give the share of documents to hold out.",
        )
        check(
            self.sequence_length is None or self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} must be at least 2 tokens.",
        )
        check_choice("data.attention", self.attention, ("causal", "document"))
        check(
            self.max_document_tokens is None or self.max_document_tokens >= 2,
            f"data.max_document_tokens={self.max_document_tokens} must be at least 2 tokens: leave it null to keep documents "
            "whole.",
        )
        check(
            self.num_workers is None or self.num_workers >= 1,
            f"data.num_workers={self.num_workers} must be at least 1: leave it null for all cores.",
        )
        if self.source == "wikitext":
            check(
                self.eos and not self.bos and self.max_document_tokens is None and self.attention == "causal",
                "data=wikitext is scored by conventions of its own: leave out data.bos, data.eos, data.max_document_tokens and "
                "data.attention.",
            )
            check(
                self.max_documents is None or self.max_documents >= 1,
                f"data.max_documents={self.max_documents} must be at least 1: it is the number of pages to score.",
            )
        else:
            check(
                self.max_documents is None or self.max_documents >= 2,
                f"data.max_documents={self.max_documents} must be at least 2: one to train on, one to hold out.",
            )
        check(
            self.source != "pydocs" or (self.path is None and self.subset is None),
            f"data=pydocs reads the docstrings of this Python, not data.path={self.path}: give data=text with it.",
        )
        check(
            self.source != "text" or self.path is not None,
            "data=text needs data.path: a file or folder of .txt, .jsonl, .jsonl.gz or .parquet.",
        )
