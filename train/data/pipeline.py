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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.corpus import find_corpus
from train.data.files import digest, lock
from train.data.folders import TOKENS_FORMAT, Storage, TokenFolder, in_place, tokenized
from train.data.index import is_complete, read_index, write_mixture_index
from train.data.own_tokenizer import check_trainable, save_tokenizer, train_tokenizer
from train.data.pack import Frame
from train.data.prepared import PreparedData, PreparedSource, SplitCounts
from train.data.sources import check_sources, sources_of, tell_uncut
from train.data.tokenizer import bos_of, check_vocabulary, load_tokenizer, separator_of, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conf.schema import DataConfig


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
    # Tokens that are read in place are checked first, because tokenizing the other sources may take hours.
    in_order = sorted(plan.streams, key=lambda one: one.jobs is not None)
    found = {one.folder: one.make(config.num_workers) for one in in_order}
    made = [found[one.folder] for one in plan.streams]
    is_mixture = config.source == "mixture"
    for one in plan.streams:
        _tell_skipped(one, config)
    if not heldout_only:
        _check_enough(made, config, sequence_length, length_key)
    folder = _mix(plan, made) if is_mixture else made[0].folder
    splits = read_index(folder)["splits"]
    return PreparedData(
        folder=folder,
        tokenizer=str(plan.storage.tokenizer_folder),
        vocab_size=plan.storage.vocab_size,
        separator=plan.storage.separator,
        sequence_length=sequence_length,
        train=SplitCounts(**splits["train"]),
        heldout=SplitCounts(**splits["heldout"]),
        bos=plan.storage.frame.bos,
        by_document=config.attention == "document",
        sources=tuple(made) if is_mixture else (),
    )


@dataclass(frozen=True)
class Preparation:
    """The folders to make for each source, and how all of them are stored."""

    streams: tuple[TokenFolder, ...]
    root: Path
    storage: Storage


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
    root = _cache_folder(config.cache_dir)
    tokenizer = tokenizer or "train"
    sources = sources_of(config)
    check_sources(sources)
    tell_uncut(config)
    # A tokenizer that does not fit is refused before text is fetched or hashed, which may take hours.
    if tokenizer == "train":
        check_trainable(sources, vocab_size)
    else:
        loaded = load_tokenizer(tokenizer)
        check_vocabulary(loaded, vocab_size, tokenizer)
        frame = _frame(config, loaded, tokenizer)
    corpora = [None if source.config.source == "tokens" else find_corpus(source.config, root) for source in sources]
    if tokenizer == "train":
        loaded = train_tokenizer(root, sources, corpora, heldout_share, vocab_size, max_length)
        frame = _frame(config, loaded, tokenizer)
    saved, tokenizer_key = save_tokenizer(loaded, root)
    storage = Storage(
        saved, tokenizer_key, vocabulary_of(loaded), separator_of(loaded, tokenizer), frame, heldout_share
    )
    streams = tuple(
        in_place(source, root, storage, loaded) if corpus is None else tokenized(source, corpus, root, storage)
        for source, corpus in zip(sources, corpora, strict=True)
    )
    _check_different(streams)
    return Preparation(streams, root, storage)


def _frame(config: DataConfig, tokenizer: PreTrainedTokenizerBase, spec: str) -> Frame:
    """Return what is put around each document; raise if the tokenizer `spec` has no such token."""
    separator = separator_of(tokenizer, spec)
    return Frame(
        bos=bos_of(tokenizer, spec) if config.bos else None,
        eos=separator if config.eos else None,
        max_tokens=config.max_document_tokens,
    )


def _cache_folder(cache_dir: str) -> Path:
    """Return the folder of prepared tokens; make it now, because writing begins only after the text was read."""
    root = Path(cache_dir).expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={cache_dir} cannot be made ({error.strerror}): give a folder that this user may write to."
        ) from None
    return root


def _check_different(streams: Sequence[TokenFolder]) -> None:
    """Raise if two sources of a mixture are the same text, whose held-out part would count twice."""
    names: dict[Path, str] = {}
    for one in streams:
        if (first := names.setdefault(one.folder, one.source.name)) != one.source.name:
            raise ValueError(
                f"data.sources: {first} and {one.source.name} have the same content: give it once, with the sum of their "
                "weights."
            )


def _mix(plan: Preparation, made: Sequence[PreparedSource]) -> str:
    """Write an index of all sources together, and return its folder."""
    folder = plan.root / "tokens" / digest([TOKENS_FORMAT, [[Path(one.folder).name, one.weight] for one in made]])
    with lock(folder):
        if not is_complete(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_mixture_index(folder, [(one.folder, one.weight) for one in made])
    return str(folder)


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


def _check_enough(made: Sequence[PreparedSource], config: DataConfig, length: int, length_key: str) -> None:
    """Raise if a source has less than a block to train on, or all of them less than a window of held-out text."""
    for one in made:
        if one.train.num_tokens < length:
            named = f"the source {one.name}" if config.source == "mixture" else f"data.source={config.source}"
            raise ValueError(
                f"{named} gives {one.train.num_tokens} training tokens ({one.train.num_documents} documents), "
                f"less than one block of {length}: give more text or a shorter {length_key}."
            )
    num_tokens, num_held, num_trained = (
        sum(counts)
        for counts in zip(
            *((one.heldout.num_tokens, one.heldout.num_documents, one.train.num_documents) for one in made), strict=True
        )
    )
    if num_tokens < length:
        raise ValueError(
            f"data.heldout_share={config.heldout_share} holds out {num_tokens} tokens "
            f"({num_held} of {num_trained + num_held} documents), less than one "
            f"window of {length}: raise data.heldout_share, give more text or a shorter {length_key}."
        )
