"""The group `data`: the text to train on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schema.checks import check, check_choice


@dataclass
class SourceConfig:
    """One source of `data=mixture`, or one held-out set: files at `path`, or a dataset on the hub."""

    path: str | None = None
    """A file or folder of text, or of tokens in the form that data=tokens reads."""
    hub: str | None = None
    """A dataset's name on the hub, or a local folder in the same layout."""
    subset: str | None = None
    """The dataset's subset."""
    split: str = "train"
    """The dataset's split to read."""
    field: str | None = None
    """The field of a record that holds its text; null takes data.text_field."""
    weight: float = 1.0
    """The source's share of the tokens, in any unit."""
    name: str | None = None
    """Name in the records; null takes the name of the file or dataset without its folder and ending."""
    max_documents: int | None = None
    """Read only this many documents; null reads all."""

    def __post_init__(self) -> None:
        check(
            (self.path is None) != (self.hub is None),
            f"a source has path={self.path} and hub={self.hub}, but needs exactly one of them: set one of the two.",
        )
        check(
            0 < self.weight < math.inf,
            f"weight={self.weight} of the source {self.stem} must be above 0 and finite: it is a share of the tokens.",
        )
        check(
            self.name is None or (not set(self.name) & set("/.") and self.name.strip() != ""),
            f"name={self.name} is part of the names of records: give a name without / and dots.",
        )
        check(
            self.stem != "",
            f"The source {self.path or self.hub} has no name for the records: give it one with name=NAME.",
        )

    @property
    def stem(self) -> str:
        """The source's name in the records."""
        if self.name is not None:
            return self.name
        return str(self.path or self.hub).rstrip("/").rpartition("/")[2].partition(".")[0]


SOURCES = ("pydocs", "text", "fineweb_edu", "hub", "tokens", "mixture", "wikitext")


@dataclass
class DataConfig:
    """The source of the text and how it is cut into blocks; see `train/data`."""

    source: str = MISSING
    """The kind of source, which data=CHOICE sets."""
    path: str | None = None
    """A file or folder of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .csv or .parquet. For `tokens`: .bin or .npy files,
    or a dataset saved to disk. For `fineweb_edu`: a local copy of its parquet files. For `wikitext`: its test file or any
    other text file. Links in a folder are followed, each file is read once, and names that begin with a dot are ignored."""
    name: str | None = None
    """For `hub`: the dataset's name there, or a local folder in the same layout."""
    subset: str | None = None
    """For `hub`, `fineweb_edu` and `wikitext`: the dataset's subset, such as sample-10BT."""
    split: str = "train"
    """For `hub`: the dataset's split to read; held-out documents are taken from it too."""
    stream: bool = False
    """For `hub`, and hub sources of a `mixture`: read documents over the network and cache their text, instead of
    downloading the dataset's files."""
    sources: list[SourceConfig] = field(default_factory=list)
    """For `mixture`: [{path or hub, subset, split, field, weight, name}, ...]."""
    token_dtype: str | None = None
    """For `tokens` without a header: uint16 or uint32; null takes the type that the tokenizer's size needs."""
    text_field: str = "text"
    """The field of a record that holds its text, or a path of fields such as meta.text."""
    on_error: str = "raise"
    """`raise` stops at a document that cannot be read; `skip` leaves such documents out, and reports their number and place."""
    heldout_share: float = 0.01
    """Share of the documents, picked by a hash of their text, that is never trained on."""
    sequence_length: int | None = None
    """Tokens in a block; null takes the model's context."""
    bos: bool = False
    """Begin each document with the tokenizer's bos token; for `tokens`: documents already begin with it."""
    eos: bool = True
    """End each document with the tokenizer's eos token, or with its bos token if it has no eos; for `tokens`: documents
    already end with it."""
    max_document_tokens: int | None = None
    """Cut documents after this many tokens, bos and eos included, and drop the rest of them; null keeps them whole."""
    attention: str = "causal"
    """`causal` attends over the whole block, including earlier documents; `document` only within the same document."""
    max_documents: int | None = None
    """Read only this many documents, or pages of `wikitext`; null reads all."""
    num_workers: int | None = None
    """Number of processes that tokenize; null takes all cores."""
    cache_dir: str = MISSING
    """Folder for the prepared tokens, which later runs reuse."""

    def __post_init__(self) -> None:
        check_choice("data.source", self.source, SOURCES)
        check_choice("data.on_error", self.on_error, ("raise", "skip"))
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
                "data=wikitext is scored by its own conventions: leave out data.bos, data.eos, data.max_document_tokens "
                "and data.attention.",
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
        self._check_source()

    def _check_source(self) -> None:
        """Raise a ValueError if a key that the source needs is missing, or a key that it does not read is given."""
        check(
            self.source != "pydocs" or (self.path is None and self.subset is None),
            f"data=pydocs reads the docstrings of this Python, not data.path={self.path}: use data=text to read it.",
        )
        check(
            self.source != "text" or self.path is not None,
            "data=text needs data.path: a file or folder of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .csv or .parquet.",
        )
        check(
            self.source != "tokens" or self.path is not None,
            "data=tokens needs data.path: .bin or .npy files, or a folder that Dataset.save_to_disk wrote.",
        )
        check(
            self.token_dtype is None
            or (self.source in ("tokens", "mixture") and self.token_dtype in ("uint16", "uint32")),
            f"data.token_dtype={self.token_dtype} must be uint16 or uint32, and only data=tokens reads it: change it "
            "or remove it.",
        )
        check(
            self.source != "hub" or (self.name is not None and self.path is None),
            "data=hub needs data.name: a dataset's name on the hub, or a local folder in the same layout.",
        )
        check(
            self.source == "hub" or self.name is None,
            f"data.name={self.name} is for data=hub: use data=hub, or remove it.",
        )
        check(
            self.source in ("hub", "mixture") or not self.stream,
            f"data.stream={self.stream} is for datasets on the hub: use data=hub, or remove it.",
        )
        check(
            self.source not in ("tokens", "mixture") or self.max_documents is None,
            f"data.max_documents={self.max_documents} does not work with data={self.source}: remove it.",
        )
        check(
            self.source != "tokens" or self.max_document_tokens is None,
            f"data.max_document_tokens={self.max_document_tokens} cannot cut tokens that are read in place: set it to null.",
        )
        check(
            (self.source == "mixture") == bool(self.sources),
            "data=mixture needs data.sources=[{path: FILE, weight: 7}, {hub: NAME, weight: 3}], and only it reads them.",
        )
        names = [source.stem for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        check(twice is None, f"data.sources has two sources called {twice}: give one of them another name.")
