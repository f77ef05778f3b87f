"""From a `DataConfig` to token streams on disk, which are made once and found again by a key of their content.

    cache_dir/documents/KEY/    jsonl of a source that has no files of its own
    cache_dir/bpe/KEY/          tokenizer.json of a trained tokenizer
    cache_dir/tokenizers/KEY/   a transformers folder
    cache_dir/tokens/KEY/       part-00000.{train,heldout}.bin .{train,heldout}.starts.bin .counts.npy .json, ...,
                                counts.npy, index.json; for tokens of other tools and for a mixture, only the index

A key is a hash of everything that its folder's content depends on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.corpus import Corpus, find_corpus
from train.data.documents import read_documents
from train.data.files import build_once, digest, lock, publish, sha256_of_all
from train.data.foreign import files_of, find_spans
from train.data.foreign_index import write_foreign_index
from train.data.index import is_complete, read_index, write_index, write_mixture_index
from train.data.pack import Frame, Job, is_done, pack
from train.data.parts import Part
from train.data.pool import Progress, parallel
from train.data.skipped import Skipped
from train.data.sources import Source, sources_of
from train.data.split import is_heldout
from train.data.tokenizer import (
    bos_of,
    check_vocabulary,
    load_tokenizer,
    separator_of,
    train_bpe,
    vocabulary_of,
    wrap_bpe,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conf.schema import DataConfig

FORMAT = 2
"""A part of a trained tokenizer's key. Increase it when a change of code makes other bytes from the same input."""
TOKENS_FORMAT = 4
"""The same for the key of tokens."""
BPE_BYTES = 50_000_000
BPE_PARTS = 256


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
    """Whether a document is read and scored without the documents before it in its block: data.attention=document."""
    sources: tuple[PreparedSource, ...] = ()
    """The sources of a mixture; empty for a single source."""

    @property
    def num_blocks(self) -> int:
        """The number of training blocks of `sequence_length` tokens."""
        return self.train.num_tokens // self.sequence_length


def prepare(
    config: DataConfig,
    tokenizer: str | None,
    vocab_size: int,
    sequence_length: int,
    length_key: str = "data.sequence_length",
    heldout_only: bool = False,
) -> PreparedData:
    """Return token streams of the configured text, from the cache if they exist.

    One process calls it. Interrupted work is resumed; a second caller waits for the first.

    Args:
        config: The text to read, and how to store it.
        tokenizer: A hub name, a folder, a SentencePiece .model file, or `train` for a byte-level BPE of `vocab_size`
            tokens; None means `train`.
        vocab_size: The model's vocabulary size.
        sequence_length: The number of tokens in a block.
        length_key: The user's name for `sequence_length` in errors.
        heldout_only: Whether to hold all documents out, for a text that is only scored.

    Raises:
        ValueError: The input cannot be used.
    """
    plan = plan_preparation(
        config, tokenizer, vocab_size, 1.0 if heldout_only else config.heldout_share, sequence_length
    )
    made = [one.make(config.num_workers) for one in plan.streams]
    for one, source in zip(plan.streams, made, strict=True):
        _tell_skipped(one, config)
        if not heldout_only:
            _check_enough(source, one.source.config, sequence_length, length_key)
    folder = made[0].folder if len(plan.sources) == 1 and config.source != "mixture" else _mix(plan, made)
    splits = read_index(folder)["splits"]
    return PreparedData(
        folder=folder,
        tokenizer=str(plan.tokenizer_folder),
        vocab_size=plan.vocab_size,
        separator=plan.separator,
        sequence_length=sequence_length,
        train=SplitCounts(**splits["train"]),
        heldout=SplitCounts(**splits["heldout"]),
        bos=plan.frame.bos,
        by_document=config.attention == "document",
        sources=tuple(made) if config.source == "mixture" else (),
    )


@dataclass(frozen=True)
class Preparation:
    """The folders to make for each source, with the tokenizer that all sources share."""

    sources: tuple[Source, ...]
    streams: tuple[TokenFolder, ...]
    root: Path
    tokenizer_folder: Path
    vocab_size: int
    separator: int
    frame: Frame


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

    def make(self, num_workers: int | None) -> PreparedSource:
        """Fill the folder unless it is complete, and return its content."""
        with lock(self.folder):
            if not is_complete(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.fill(num_workers)
        splits = read_index(self.folder)["splits"]
        train, heldout = (SplitCounts(**splits[split]) for split in ("train", "heldout"))
        return PreparedSource(self.source.name, self.source.weight, str(self.folder), train, heldout)


def plan_preparation(
    config: DataConfig, tokenizer: str | None, vocab_size: int, heldout_share: float, max_length: int
) -> Preparation:
    """Find the sources' files, load or train the tokenizer, and determine the folders of tokens to make.

    Args:
        config: The text to read, and how to store it.
        tokenizer: As in `prepare`.
        vocab_size: The model's vocabulary size.
        heldout_share: The share of the documents to hold out.
        max_length: The longest input, in tokens, that a trained tokenizer declares.

    Raises:
        ValueError: The input cannot be used.
    """
    root = Path(config.cache_dir).expanduser().resolve()
    tokenizer = tokenizer or "train"
    sources = sources_of(config)
    corpora = [None if source.config.source == "tokens" else find_corpus(source.config, root) for source in sources]
    if tokenizer == "train":
        loaded = _train_tokenizer(root, sources, corpora, heldout_share, vocab_size, max_length)
    else:
        loaded = load_tokenizer(tokenizer)
    check_vocabulary(loaded, vocab_size, tokenizer)
    separator, size = separator_of(loaded, tokenizer), vocabulary_of(loaded)
    frame = Frame(
        bos=bos_of(loaded, tokenizer) if config.bos else None,
        eos=separator if config.eos else None,
        max_tokens=config.max_document_tokens,
    )
    saved, tokenizer_key = _save_tokenizer(loaded, root)
    streams = []
    for source, corpus in zip(sources, corpora, strict=True):
        if corpus is None:
            streams.append(_in_place(source, root, loaded, tokenizer_key, size, separator, heldout_share))
            continue
        key = digest([TOKENS_FORMAT, corpus.key, heldout_share, tokenizer_key, separator, astuple(frame)])
        streams.append(_tokenized(source, corpus, root / "tokens" / key, saved, tokenizer_key, size, separator, frame,
                                  heldout_share))  # fmt: skip
    return Preparation(tuple(sources), tuple(streams), root, saved, size, separator, frame)


def _tokenized(
    source: Source,
    corpus: Corpus,
    folder: Path,
    tokenizer_folder: Path,
    tokenizer_key: str,
    vocab_size: int,
    separator: int,
    frame: Frame,
    heldout_share: float,
) -> TokenFolder:
    @cache
    def jobs() -> list[Job]:
        return [
            Job(
                part=part,
                index=index,
                folder=str(folder),
                text_field=corpus.text_field,
                heldout_share=heldout_share,
                tokenizer=str(tokenizer_folder),
                separator=separator,
                frame=frame,
                vocab_size=vocab_size,
                skips_errors=corpus.skips_errors,
            )
            for index, part in enumerate(corpus.parts())
        ]

    def finish(done: list[Job]) -> None:
        write_index(folder, done, tokenizer_key)

    def fill(num_workers: int | None) -> None:
        for leftover in folder.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        pack_all(jobs(), num_workers)
        finish(jobs())

    return TokenFolder(source, folder, fill, jobs, finish)


def _in_place(
    source: Source,
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_key: str,
    vocab_size: int,
    separator: int,
    heldout_share: float,
) -> TokenFolder:
    config = source.config
    assert config.path is not None
    spans = find_spans(config.path, vocab_size, config.token_dtype)
    files = files_of(config.path)
    hashes = dict(zip(map(str, files), sha256_of_all(files, memo=root / "sha256.json"), strict=True))
    places = [[span.file, span.offset, span.dtype, span.num_tokens] for span in spans]
    key = digest([TOKENS_FORMAT, "in place", hashes, places, heldout_share, tokenizer_key, separator])
    folder = root / "tokens" / key

    def fill(_: int | None) -> None:
        write_foreign_index(
            folder,
            spans,
            vocab_size=vocab_size,
            separator=separator,
            heldout_share=heldout_share,
            tokenizer_key=tokenizer_key,
            decode=lambda ids: str(tokenizer.decode(ids)),
            hashes=hashes,
        )

    return TokenFolder(source, folder, fill)


def pack_all(jobs: Sequence[Job], num_workers: int | None) -> None:
    """Tokenize the parts that are not done yet."""
    waiting = [job for job in jobs if not is_done(job)]
    parallel(pack, waiting, label="tokenize", num_workers=num_workers, sizes=[job.part.num_bytes for job in waiting])


def _mix(plan: Preparation, made: Sequence[PreparedSource]) -> str:
    """Write an index of all sources together, and return its folder."""
    folder = plan.root / "tokens" / digest([TOKENS_FORMAT, [[Path(one.folder).name, one.weight] for one in made]])
    with lock(folder):
        if not is_complete(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_mixture_index(folder, [(one.folder, one.weight) for one in made])
    return str(folder)


def _train_tokenizer(
    root: Path,
    sources: Sequence[Source],
    corpora: Sequence[Corpus | None],
    heldout_share: float,
    vocab_size: int,
    max_length: int,
) -> PreTrainedTokenizerBase:
    texts = [(source.weight, corpus) for source, corpus in zip(sources, corpora, strict=True) if corpus is not None]
    if len(texts) < len(sources):
        raise ValueError("data=tokens needs the tokenizer that wrote the tokens: give its folder or name in tokenizer.")
    total = sum(weight for weight, _ in texts)

    def build(folder: Path) -> None:
        with Progress("train tokenizer", 0) as progress:
            shares = (_training_texts(one, heldout_share, weight / total, progress) for weight, one in texts)
            train_bpe((text for share in shares for text in share), vocab_size, folder / "tokenizer.json")

    keys = [[weight / total, corpus.key] for weight, corpus in texts]
    key = digest([FORMAT, keys if len(keys) > 1 else texts[0][1].key, heldout_share, vocab_size])
    return wrap_bpe(build_once(root / "bpe" / key, build) / "tokenizer.json", max_length)


def _training_texts(corpus: Corpus, heldout_share: float, weight: float, progress: Progress) -> Iterator[str]:
    """Yield training documents for the tokenizer: the first of each part, about 50 MB from all sources together."""
    parts: list[Part] = corpus.parts()
    parts = parts[:: -(-len(parts) // BPE_PARTS)]
    for part in parts:
        left = int(weight * BPE_BYTES) // len(parts)
        for text in read_documents(part, corpus.text_field, Skipped() if corpus.skips_errors else None):
            if not is_heldout(encoded := text.encode(), heldout_share):
                yield text
                progress.add(len(encoded))
                left -= len(encoded)
                if left <= 0:
                    break


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, root: Path) -> tuple[Path, str]:
    """Return (transformers folder, key); the key depends only on settings that change the ids."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        hashes = dict(zip((file.name for file in files), sha256_of_all(files), strict=True))
        saved = publish(Path(folder), root / "tokenizers" / digest(hashes))
    return saved, hashes.get("tokenizer.json") or digest(hashes)


def _tell_skipped(stream: TokenFolder, config: DataConfig) -> None:
    """Report on stderr how many documents could not be read, with the first errors."""
    skipped = read_index(stream.folder)["skipped"]
    if skipped["count"]:
        noun = "document" if skipped["count"] == 1 else "documents"
        print(
            f"data.on_error={config.on_error} left out {skipped['count']:,} {noun} of {stream.source.name}, the first:",
            *skipped["first"],
            sep="\n  ",
            file=sys.stderr,
            flush=True,
        )


def _check_enough(source: PreparedSource, config: DataConfig, length: int, length_key: str) -> None:
    train, heldout = source.train, source.heldout
    named = f"data.source={config.source}" if source.name == config.source else f"the source {source.name}"
    if train.num_tokens < length:
        raise ValueError(
            f"{named} gives {train.num_tokens} training tokens ({train.num_documents} documents), "
            f"less than one block of {length}: give more text or a shorter {length_key}."
        )
    if heldout.num_tokens < length:
        raise ValueError(
            f"data.heldout_share={config.heldout_share} holds out {heldout.num_tokens} tokens "
            f"({heldout.num_documents} of {train.num_documents + heldout.num_documents} documents), less than one "
            f"window of {length}: raise data.heldout_share, give more text or a shorter {length_key}."
        )
