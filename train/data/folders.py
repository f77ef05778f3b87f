"""The folder of tokens that is made from one source: its text is tokenized, or ids of other tools get an index."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.corpus import Corpus
from train.data.files import digest, lock, sha256_of_all
from train.data.foreign import files_of, find_spans
from train.data.foreign_index import decoder, write_foreign_index
from train.data.index import is_complete, read_index, write_index
from train.data.pack import Frame, Job, is_done, pack
from train.data.pool import parallel
from train.data.prepared import PreparedSource, SplitCounts
from train.data.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_FORMAT = 4
"""A part of the key of tokens. Increase it when a change of code makes other bytes from the same input."""
INDEX_FORMAT = 2
"""The same for the index of tokens that are read in place."""
LEFTOVER_S = 3600.0
"""The seconds after which a partial file that nobody writes to is known to be left over."""


@dataclass(frozen=True)
class Storage:
    """The tokenizer and the layout in which all sources of a run are stored."""

    tokenizer_folder: Path
    tokenizer_key: str
    vocab_size: int
    separator: int
    frame: Frame
    heldout_share: float


@dataclass(frozen=True)
class TokenFolder:
    """The folder of tokens made from a source."""

    source: Source
    folder: Path
    fill: Callable[[int | None], None]
    """Makes the missing files of the folder, with the given number of workers; the caller holds the folder's lock."""
    jobs: Callable[[], list[Job]] | None = None
    """Returns the parts to tokenize; None for tokens that are read in place."""
    finish: Callable[[list[Job]], None] | None = None
    """Writes the index once all parts are done."""
    bos: int | None = None
    """The id with which documents that are read in place must begin; None for no such rule."""

    def make(self, num_workers: int | None) -> PreparedSource:
        """Fill the folder unless it is complete, and return its content.

        Raises:
            ValueError: The source cannot be read, or its documents do not begin with bos as the user says.
        """
        with lock(self.folder):
            if not is_complete(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.fill(num_workers)
        index = read_index(self.folder)
        if self.bos is not None and index["first_id"] != self.bos:
            raise ValueError(
                f"data.bos=true, but not all documents of {self.source.config.path} begin with the bos id {self.bos}: set "
                "data.bos=false, because tokens are read as they are."
            )
        train, heldout = (SplitCounts(**index["splits"][split]) for split in ("train", "heldout"))
        return PreparedSource(self.source.name, self.source.weight, str(self.folder), train, heldout)


def tokenized(source: Source, corpus: Corpus, root: Path, storage: Storage) -> TokenFolder:
    """Return the folder of a source of text.

    Args:
        source: The source.
        corpus: Its text.
        root: The cache folder.
        storage: How tokens are stored.
    """
    own = [storage.heldout_share, storage.tokenizer_key, storage.separator, astuple(storage.frame)]
    folder = root / "tokens" / digest([TOKENS_FORMAT, corpus.key, *own])

    @cache
    def jobs() -> list[Job]:
        return [
            Job(
                part=part,
                index=index,
                folder=str(folder),
                text_field=corpus.text_field,
                heldout_share=storage.heldout_share,
                tokenizer=str(storage.tokenizer_folder),
                frame=storage.frame,
                vocab_size=storage.vocab_size,
                skips_errors=corpus.skips_errors,
            )
            for index, part in enumerate(corpus.parts())
        ]

    def finish(done: list[Job]) -> None:
        write_index(folder, done, storage.vocab_size, storage.separator, storage.tokenizer_key)
        _remove_leftovers(folder)

    def fill(num_workers: int | None) -> None:
        _remove_leftovers(folder)
        pack_all(jobs(), num_workers)
        finish(jobs())

    return TokenFolder(source, folder, fill, jobs, finish)


def in_place(source: Source, root: Path, storage: Storage, tokenizer: PreTrainedTokenizerBase) -> TokenFolder:
    """Return the folder of a source of tokens, which holds only an index.

    Args:
        source: The source.
        root: The cache folder.
        storage: How tokens are stored.
        tokenizer: The tokenizer that wrote the tokens.
    """
    config = source.config
    assert config.path is not None
    spans = find_spans(config.path, storage.vocab_size, config.token_dtype)
    files = files_of(config.path)
    hashes = dict(zip(map(str, files), sha256_of_all(files, memo=root / "sha256.json"), strict=True))
    places = [[span.file, span.offset, span.dtype, span.num_tokens] for span in spans]
    own = [storage.heldout_share, storage.tokenizer_key, storage.separator]
    folder = root / "tokens" / digest([INDEX_FORMAT, "in place", hashes, places, *own])

    def fill(_: int | None) -> None:
        write_foreign_index(
            folder,
            spans,
            vocab_size=storage.vocab_size,
            separator=storage.separator,
            heldout_share=storage.heldout_share,
            tokenizer_key=storage.tokenizer_key,
            num_bytes_of=decoder(tokenizer),
            hashes=hashes,
        )

    return TokenFolder(source, folder, fill, bos=storage.frame.bos)


def _remove_leftovers(folder: Path) -> None:
    """Remove partial files of killed processes; younger ones may belong to a process on another machine."""
    for file in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > LEFTOVER_S:
                file.unlink()


def pack_all(jobs: Sequence[Job], num_workers: int | None) -> None:
    """Tokenize the parts that are not done yet."""
    waiting = [job for job in jobs if not is_done(job)]
    parallel(pack, waiting, label="tokenize", num_workers=num_workers, sizes=[job.part.num_bytes for job in waiting])
