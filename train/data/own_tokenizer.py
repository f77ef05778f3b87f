"""The tokenizer of a preparation: trained on its text if none is given, and kept in the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.corpus import Corpus
from train.data.documents import read_documents
from train.data.files import build_once, digest, publish, sha256_of_all
from train.data.parts import Part
from train.data.pool import Progress
from train.data.skipped import Skipped
from train.data.sources import Source
from train.data.split import is_heldout
from train.data.tokenizer import END_OF_TEXT, MIN_TRAINED_VOCABULARY, train_bpe, wrap_bpe

FORMAT = 3
"""A part of a trained tokenizer's key. Increase it when a change of code makes other bytes from the same input."""
BPE_BYTES = 50_000_000
BPE_PARTS = 256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_trainable(sources: Sequence[Source], vocab_size: int) -> None:
    """Refuse to train a tokenizer on tokens, or of too few tokens, before any text is read.

    Args:
        sources: The sources.
        vocab_size: The number of tokens.

    Raises:
        ValueError: A source holds tokens, or `vocab_size` is too small.
    """
    if any(source.config.source == "tokens" for source in sources):
        raise ValueError("data=tokens needs the tokenizer that wrote the tokens: give its folder or name in tokenizer.")
    if vocab_size < MIN_TRAINED_VOCABULARY:
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small to train a tokenizer: "
            f"give at least {MIN_TRAINED_VOCABULARY}, the 256 bytes and {END_OF_TEXT}."
        )


def train_tokenizer(
    root: Path,
    sources: Sequence[Source],
    corpora: Sequence[Corpus | None],
    heldout_share: float,
    vocab_size: int,
    max_length: int,
) -> PreTrainedTokenizerBase:
    """Return a tokenizer trained on the sources by their weights, from the cache if it exists.

    Args:
        root: The cache folder.
        sources: The sources.
        corpora: The text of each source; None for tokens.
        heldout_share: The share of the documents to hold out, also from the tokenizer.
        vocab_size: The number of tokens.
        max_length: The longest input, in tokens, that the tokenizer declares.

    Raises:
        ValueError: The text cannot be read.
    """
    texts = [(source.weight, corpus) for source, corpus in zip(sources, corpora, strict=True) if corpus is not None]
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
    parts = parts[:: max(1, -(-len(parts) // BPE_PARTS))]
    for part in parts:
        left = int(weight * BPE_BYTES) // len(parts)
        for text in read_documents(part, corpus.text_field, Skipped() if corpus.skips_errors else None):
            if not is_heldout(encoded := text.encode(), heldout_share):
                yield text
                progress.add(len(encoded))
                left -= len(encoded)
                if left <= 0:
                    break


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, root: Path) -> tuple[Path, str]:
    """Return (transformers folder, key); the key depends only on settings that change the ids."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        hashes = dict(zip((file.name for file in files), sha256_of_all(files), strict=True))
        saved = publish(Path(folder), root / "tokenizers" / digest(hashes))
    return saved, hashes.get("tokenizer.json") or digest(hashes)
