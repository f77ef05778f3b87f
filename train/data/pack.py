"""Documents to ids: every document's tokens and a separator, one file for each part and split."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsity.common.files import aside
from train.data.documents import read_documents
from train.data.parts import Part
from train.data.split import is_heldout

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
BATCH_BYTES = 1 << 20

Encode = Callable[[list[str]], Iterable[list[int]]]


@dataclass(frozen=True)
class Job:
    """One part to tokenize, and where to."""

    part: Part
    index: int
    folder: str
    text_field: str
    heldout_share: float
    tokenizer: str
    """Folder of the tokenizer."""
    separator: int
    vocab_size: int

    @property
    def sidecar(self) -> Path:
        return Path(self.folder, f"part-{self.index:05}.json")

    @property
    def counts(self) -> Path:
        return Path(self.folder, f"part-{self.index:05}.counts.npy")

    def tokens(self, split: str) -> Path:
        return Path(self.folder, f"part-{self.index:05}.{split}.bin")


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Two bytes an id where they hold the vocabulary, else four; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_done(job: Job) -> bool:
    """True if the part's files are there with the sizes that its sidecar, which is written last, tells."""
    try:
        record = json.loads(job.sidecar.read_text(encoding="utf-8"))
        width = id_dtype(job.vocab_size).itemsize
        sizes = {split: record[split]["num_tokens"] * width for split in SPLITS}
        return job.counts.exists() and all(job.tokens(split).stat().st_size == sizes[split] for split in SPLITS)
    except (OSError, ValueError, KeyError):
        return False


def pack(job: Job) -> None:
    """Tokenize a part: write its ids by split, its training counts by id, and last the sidecar that tells of them."""
    encode = encoder(job.tokenizer)
    dtype = id_dtype(job.vocab_size)
    record: dict[str, dict[str, Any]] = {
        split: {"num_documents": 0, "num_tokens": 0, "num_bytes": 0} for split in SPLITS
    }
    counts = np.zeros(job.vocab_size, np.int64)
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(aside(job.tokens(split))) for split in SPLITS}
        files = {split: stack.enter_context(open(outputs[split], "wb")) for split in SPLITS}
        hashes = {split: hashlib.sha256() for split in SPLITS}
        for side, texts, num_bytes in _batches(read_documents(job.part, job.text_field), job.heldout_share):
            ids: list[int] = []
            for tokens in encode(texts):
                ids += tokens
                ids.append(job.separator)
            array = np.array(ids, dtype)
            files[side].write(array.data)
            hashes[side].update(array.data)
            if side == "train":
                counts += np.bincount(array, minlength=job.vocab_size)
            record[side]["num_documents"] += len(texts)
            record[side]["num_tokens"] += len(ids)
            record[side]["num_bytes"] += num_bytes
    for split in SPLITS:
        record[split]["sha256"] = hashes[split].hexdigest()
    with aside(job.counts) as partial, open(partial, "wb") as file:
        np.save(file, counts)
    with aside(job.sidecar) as partial:
        partial.write_text(json.dumps(record), encoding="utf-8")


def _batches(texts: Iterable[str], heldout_share: float) -> Iterator[tuple[Split, list[str], int]]:
    """(split, documents, their UTF-8 bytes), about a megabyte at a time; order within a split is kept."""
    waiting: dict[Split, list[str]] = {split: [] for split in SPLITS}
    num_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for text in texts:
        encoded = text.encode()
        side: Split = "heldout" if is_heldout(encoded, heldout_share) else "train"
        waiting[side].append(text)
        num_bytes[side] += len(encoded)
        if num_bytes[side] >= BATCH_BYTES:
            yield side, waiting[side], num_bytes[side]
            waiting[side], num_bytes[side] = [], 0
    for split in SPLITS:
        if waiting[split]:
            yield split, waiting[split], num_bytes[split]


@lru_cache(maxsize=1)
def encoder(folder: str) -> Encode:
    """Texts to ids without special tokens: what looks like one in a text is text.

    A fast tokenizer is read by the `tokenizers` library alone: transformers takes seconds to import.
    """
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    file = Path(folder, "tokenizer.json")
    if not file.exists():
        return _slow_encoder(folder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> Iterable[list[int]]:
        return (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    return encode


def _slow_encoder(folder: str) -> Encode:
    from train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def encode(texts: list[str]) -> Iterable[list[int]]:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    return encode
