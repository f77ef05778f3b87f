"""Tokenizing documents: each document's tokens between its bos and eos, in two files for each part and split."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsity.common.files import aside
from train.data.documents import read_documents
from train.data.parts import Part
from train.data.skipped import Skipped
from train.data.split import is_heldout

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
BATCH_BYTES = 1 << 20
FAST = "tokenizer.json"

STARTS_DTYPE = np.dtype("<u8")
"""The type of the positions at which a part's documents begin."""

Encode = Callable[[list[str]], Iterable[list[int]]]


@dataclass(frozen=True)
class Frame:
    """The ids put around a document's tokens, None for no id, and the number of ids to keep of a document."""

    bos: int | None
    eos: int | None
    max_tokens: int | None = None

    def around(self, tokens: list[int]) -> list[int]:
        """Return the document's ids as they are stored."""
        begin = [] if self.bos is None else [self.bos]
        end = [] if self.eos is None else [self.eos]
        return [*begin, *tokens, *end][: self.max_tokens]

    def num_kept(self, num_tokens: int) -> int:
        """Return how many of a document's own tokens are stored."""
        return num_tokens if self.max_tokens is None else min(num_tokens, self.max_tokens - (self.bos is not None))


@dataclass(frozen=True)
class Job:
    """One part to tokenize, and where to write its tokens."""

    part: Part
    index: int
    folder: str
    text_field: str
    heldout_share: float
    tokenizer: str
    """The tokenizer's folder."""
    frame: Frame
    vocab_size: int
    skips_errors: bool = False
    """True if documents that cannot be read are skipped."""

    @property
    def sidecar(self) -> Path:
        """The path of its figures, whose presence marks the part as done."""
        return Path(self.folder, f"part-{self.index:05}.json")

    @property
    def counts(self) -> Path:
        """The path of its counts of each token."""
        return Path(self.folder, f"part-{self.index:05}.counts.npy")

    def tokens(self, split: str) -> Path:
        """Return the path of its tokens of a split."""
        return Path(self.folder, f"part-{self.index:05}.{split}.bin")

    def starts(self, split: str) -> Path:
        """Return the path of the starts of its documents of a split."""
        return Path(self.folder, f"part-{self.index:05}.{split}.starts.bin")


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of stored ids: two bytes if they can hold the vocabulary, else four; always little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_done(job: Job) -> bool:
    """Return whether the part's files exist with the sizes given in its sidecar, which is written last."""
    try:
        record = json.loads(job.sidecar.read_text(encoding="utf-8"))
        width = id_dtype(job.vocab_size).itemsize
        sizes = {split: record[split]["num_tokens"] * width for split in SPLITS}
        starts = {split: record[split]["num_documents"] * STARTS_DTYPE.itemsize for split in SPLITS}
        return (
            job.counts.exists()
            and all(job.tokens(split).stat().st_size == sizes[split] for split in SPLITS)
            and all(job.starts(split).stat().st_size == starts[split] for split in SPLITS)
        )
    except (OSError, ValueError, KeyError):
        return False


def pack(job: Job) -> None:
    """Tokenize a part: write ids and starts for each split, counts of the training ids, and last the sidecar."""
    encode = encoder(job.tokenizer)
    dtype = id_dtype(job.vocab_size)
    skipped = Skipped()
    record: dict[str, dict[str, Any]] = {
        split: {"num_documents": 0, "num_tokens": 0, "num_bytes": 0} for split in SPLITS
    }
    counts = np.zeros(job.vocab_size, np.int64)
    starts: dict[str, list[int]] = {split: [] for split in SPLITS}
    documents = read_documents(job.part, job.text_field, skipped if job.skips_errors else None)
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(aside(job.tokens(split))) for split in SPLITS}
        files = {split: stack.enter_context(open(outputs[split], "wb")) for split in SPLITS}
        hashes = {split: hashlib.sha256() for split in SPLITS}
        for side, texts, num_bytes in _batches(documents, job.heldout_share):
            ids: list[int] = []
            for text, tokens in zip(texts, encode(texts), strict=True):
                starts[side].append(record[side]["num_tokens"] + len(ids))
                ids += job.frame.around(tokens)
                if (kept := job.frame.num_kept(len(tokens))) < len(tokens):
                    num_bytes -= len(text.encode()) - kept_bytes(job.tokenizer, text, tokens, kept)
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
        array = np.array(starts[split], STARTS_DTYPE)
        record[split]["starts_sha256"] = hashlib.sha256(array.data).hexdigest()
        with aside(job.starts(split)) as partial:
            array.tofile(partial)
    record["skipped"] = asdict(skipped)
    with aside(job.counts) as partial, open(partial, "wb") as file:
        np.save(file, counts)
    with aside(job.sidecar) as partial:
        partial.write_text(json.dumps(record), encoding="utf-8")


def _batches(texts: Iterable[str], heldout_share: float) -> Iterator[tuple[Split, list[str], int]]:
    """Yield (split, documents, number of their UTF-8 bytes), about a megabyte at a time, in order within each split."""
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
    """Return a function from texts to ids; text that looks like a special token is encoded as text.

    A fast tokenizer is loaded with only the `tokenizers` library, because importing transformers takes seconds.
    """
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not Path(folder, FAST).exists():
        return _slow_encoder(folder)
    tokenizer = _fast_tokenizer(folder)

    def encode(texts: list[str]) -> Iterable[list[int]]:
        return (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    return encode


@lru_cache(maxsize=1)
def _fast_tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder, FAST)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def kept_bytes(folder: str, text: str, tokens: list[int], num_kept: int) -> int:
    """Return the number of UTF-8 bytes of `text` that its first tokens cover.

    Args:
        folder: The tokenizer's folder.
        text: A document.
        tokens: All its tokens.
        num_kept: The number of tokens to count.
    """
    if num_kept == 0:
        return 0
    if not Path(folder, FAST).exists():
        from train.data.tokenizer import load_tokenizer

        return len(str(load_tokenizer(folder).decode(tokens[:num_kept])).encode())
    end = _fast_tokenizer(folder).encode(text, add_special_tokens=False).offsets[num_kept - 1][1]
    return len(text[:end].encode())


def _slow_encoder(folder: str) -> Encode:
    from train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def encode(texts: list[str]) -> Iterable[list[int]]:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    return encode
