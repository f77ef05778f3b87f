"""From a `DataConfig` to token streams on disk, made once and found again by their content.

    cache_dir/documents/KEY/    jsonl of a source that has no files of its own
    cache_dir/bpe/KEY/          tokenizer.json of a trained tokenizer
    cache_dir/tokenizers/KEY/   a transformers folder
    cache_dir/tokens/KEY/       part-00000.{train,heldout}.bin .{train,heldout}.starts.bin .counts.npy .json, ...,
                                counts.npy, index.json

A key is a hash of everything that what lies under it depends on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.corpus import Corpus, find_corpus
from train.data.documents import read_documents
from train.data.files import build_once, digest, lock, publish, sha256_of_all
from train.data.index import is_complete, read_index, write_index
from train.data.pack import Frame, Job, is_done, pack
from train.data.parts import Part
from train.data.pool import Progress, parallel
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
"""Goes into a trained tokenizer's key; raise it when the same input should give other bytes."""
TOKENS_FORMAT = 3
"""Goes into the tokens' key in the same way."""
BPE_BYTES = 50_000_000
BPE_PARTS = 256


@dataclass(frozen=True)
class SplitCounts:
    num_documents: int
    num_tokens: int
    """Bos and eos counted."""
    num_bytes: int
    """UTF-8 bytes of the documents' text, as far as its tokens were kept."""


@dataclass(frozen=True)
class PreparedData:
    """Where the tokens lie and what there is of them; plain data, to be sent to the other ranks."""

    folder: str
    tokenizer: str
    """A transformers folder."""
    vocab_size: int
    """The tokenizer's: one more than its largest id."""
    separator: int
    """The id that ends a document, and that a text without a beginning is scored after."""
    sequence_length: int
    train: SplitCounts
    heldout: SplitCounts
    bos: int | None = None
    """The id that begins every document, if there is one."""
    by_document: bool = False
    """Whether a document is read and scored without those before it in its block: data.attention=document."""

    @property
    def num_blocks(self) -> int:
        """Training blocks of `sequence_length` tokens."""
        return self.train.num_tokens // self.sequence_length


def prepare(
    config: DataConfig,
    tokenizer: str | None,
    vocab_size: int,
    sequence_length: int,
    length_key: str = "data.sequence_length",
) -> PreparedData:
    """Token streams of the configured text, from the cache where they are there; one process calls it.

    `tokenizer` is a hub name, a folder, a SentencePiece .model file, or `train`: a byte-level BPE of
    `vocab_size`; None is `train`.
    `length_key` is the user's name for `sequence_length` in errors.
    What was interrupted goes on where it stopped; a second caller waits for the first. Input that cannot be used is
    a `ValueError` of one sentence.
    """
    root = Path(config.cache_dir).expanduser().resolve()
    tokenizer = tokenizer or "train"
    corpus = find_corpus(config, root)
    parts = cache(corpus.parts)
    if tokenizer == "train":
        loaded = _train_tokenizer(root, corpus, parts, config.heldout_share, vocab_size, sequence_length)
    else:
        loaded = load_tokenizer(tokenizer)
    check_vocabulary(loaded, vocab_size, tokenizer)
    separator, size = separator_of(loaded, tokenizer), vocabulary_of(loaded)
    frame = Frame(
        bos=bos_of(loaded, tokenizer) if config.bos else None,
        eos=separator if config.eos else None,
        max_tokens=config.max_document_tokens,
    )
    tokenizer_folder, tokenizer_key = _save_tokenizer(loaded, root)

    key = digest([TOKENS_FORMAT, corpus.key, config.heldout_share, tokenizer_key, separator, astuple(frame)])
    folder = root / "tokens" / key
    job = partial(
        Job,
        folder=str(folder),
        text_field=corpus.text_field,
        heldout_share=config.heldout_share,
        tokenizer=str(tokenizer_folder),
        separator=separator,
        frame=frame,
        vocab_size=size,
    )
    with lock(folder):
        if not is_complete(folder):
            jobs = [job(part, index) for index, part in enumerate(parts())]
            _pack_all(folder, jobs, config.num_workers)
            write_index(folder, jobs, tokenizer_key)
    splits = read_index(folder)["splits"]
    prepared = PreparedData(
        folder=str(folder),
        tokenizer=str(tokenizer_folder),
        vocab_size=size,
        separator=separator,
        sequence_length=sequence_length,
        train=SplitCounts(**splits["train"]),
        heldout=SplitCounts(**splits["heldout"]),
        bos=frame.bos,
        by_document=config.attention == "document",
    )
    _check_enough(prepared, config, length_key)
    return prepared


def _train_tokenizer(
    root: Path,
    corpus: Corpus,
    parts: Callable[[], list[Part]],
    heldout_share: float,
    vocab_size: int,
    max_length: int,
) -> PreTrainedTokenizerBase:
    def build(folder: Path) -> None:
        with Progress("train tokenizer", 0) as progress:
            texts = _training_texts(parts(), corpus.text_field, heldout_share, progress)
            train_bpe(texts, vocab_size, folder / "tokenizer.json")

    key = digest([FORMAT, corpus.key, heldout_share, vocab_size])
    return wrap_bpe(build_once(root / "bpe" / key, build) / "tokenizer.json", max_length)


def _training_texts(parts: Sequence[Part], text_field: str, heldout_share: float, progress: Progress) -> Iterator[str]:
    """Training documents for the tokenizer: the first of each part, about 50 MB together."""
    parts = parts[:: -(-len(parts) // BPE_PARTS)]
    for part in parts:
        left = BPE_BYTES // len(parts)
        for text in read_documents(part, text_field):
            if not is_heldout(encoded := text.encode(), heldout_share):
                yield text
                progress.add(len(encoded))
                left -= len(encoded)
                if left <= 0:
                    break


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, root: Path) -> tuple[Path, str]:
    """(transformers folder, key of how it encodes): settings that leave the ids alone are not part of the key."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        hashes = dict(zip((file.name for file in files), sha256_of_all(files), strict=True))
        saved = publish(Path(folder), root / "tokenizers" / digest(hashes))
    return saved, hashes.get("tokenizer.json") or digest(hashes)


def _pack_all(folder: Path, jobs: Sequence[Job], num_workers: int | None) -> None:
    """Do the jobs that are not done yet; the caller holds the folder's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    waiting = [job for job in jobs if not is_done(job)]
    parallel(pack, waiting, label="tokenize", num_workers=num_workers, sizes=[job.part.num_bytes for job in waiting])


def _check_enough(prepared: PreparedData, config: DataConfig, length_key: str) -> None:
    length, train, heldout = prepared.sequence_length, prepared.train, prepared.heldout
    if train.num_tokens < length:
        raise ValueError(
            f"data.source={config.source} gives {train.num_tokens} training tokens ({train.num_documents} documents), "
            f"less than one block of {length}: give more text or a shorter {length_key}."
        )
    if heldout.num_tokens < length:
        raise ValueError(
            f"data.heldout_share={config.heldout_share} holds out {heldout.num_tokens} tokens "
            f"({heldout.num_documents} of {train.num_documents + heldout.num_documents} documents), less than one "
            f"window of {length}: raise data.heldout_share, give more text or a shorter {length_key}."
        )
