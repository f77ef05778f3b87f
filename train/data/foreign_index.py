"""The index of tokens that other tools wrote: which ids are trained on, and which are held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.files import aside, sha256_of
from train.data.foreign import checked_counts, document_starts
from train.data.index import COUNTS, INDEX
from train.data.pack import STARTS_DTYPE, id_dtype
from train.data.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_PIECE = 1 << 20


def write_foreign_index(
    folder: Path,
    spans: Sequence[Span],
    *,
    vocab_size: int,
    separator: int,
    heldout_share: float,
    tokenizer_key: str,
    num_bytes_of: Callable[[Iterable[list[int]]], int],
    hashes: Mapping[str, str],
) -> None:
    """Write counts, starts of documents and index.json for ids that stay in their own files.

    The end of each file is held out, beginning with a whole document if possible. Our own tokens are held out by a hash
    of each document's text, but here the text is not known.

    Args:
        folder: Where to write.
        spans: The places of the ids.
        vocab_size: The tokenizer's vocabulary size.
        separator: The id that ends a document.
        heldout_share: The share of each span to hold out.
        tokenizer_key: The hash of the tokenizer's files.
        num_bytes_of: Returns the number of bytes of documents' text, given their ids; used for the held-out part.
        hashes: The sha256 of each file of `spans`.
    """
    counts = np.zeros(vocab_size, np.int64)
    parts: list[dict[str, Any]] = []
    first_ids: set[int] = set()
    for number, span in enumerate(spans):
        counts += checked_counts(span, vocab_size)
        starts = document_starts(span, separator)
        cut = heldout_cut(span.num_tokens, starts, heldout_share)
        held = span.read(cut)
        counts -= np.bincount(held, minlength=vocab_size)
        num_bytes = num_bytes_of(documents_of(held, starts[starts > cut] - cut))
        first_ids |= set(np.unique(span.read()[starts]).tolist())
        part: dict[str, Any] = {}
        for split, begin, end in (("train", 0, cut), ("heldout", cut, span.num_tokens)):
            own = starts[(starts >= begin) & (starts < end)] - begin
            name = f"part-{number:05}.{split}.starts.bin"
            with aside(folder / name) as partial:
                own.astype(STARTS_DTYPE).tofile(partial)
            part[split] = {
                "file": span.file,
                "offset": span.offset + begin * np.dtype(span.dtype).itemsize,
                "dtype": span.dtype,
                "sha256": hashes[span.file],
                "starts": name,
                "starts_sha256": sha256_of(folder / name),
                "num_documents": len(own),
                "num_tokens": end - begin,
                "num_bytes": num_bytes if split == "heldout" else 0,
            }
        parts.append(part)
    with aside(folder / COUNTS) as partial, open(partial, "wb") as file:
        np.save(file, counts)
    totals = {
        split: {name: sum(part[split][name] for part in parts) for name in ("num_documents", "num_tokens", "num_bytes")}
        for split in ("train", "heldout")
    }
    index = {
        "dtype": id_dtype(vocab_size).str,
        "vocab_size": vocab_size,
        "separator": separator,
        "tokenizer": tokenizer_key,
        "splits": totals,
        "skipped": {"count": 0, "first": []},
        "first_id": first_ids.pop() if len(first_ids) == 1 else None,
        "parts": parts,
    }
    with aside(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")


def documents_of(ids: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> Iterator[list[int]]:
    """Yield the ids of each document, given where all but the first begin; a very long one in several pieces."""
    for piece in np.split(ids, starts):
        for begin in range(0, len(piece), LONGEST_PIECE):
            yield piece[begin : begin + LONGEST_PIECE].tolist()


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Iterable[list[int]]], int]:
    """Return a function from documents' ids to the number of bytes of their text; special tokens are not text."""

    def num_bytes(documents: Iterable[list[int]]) -> int:
        texts = (
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in documents
        )
        return sum(len(str(text).encode(errors="replace")) for text in texts)

    return num_bytes


def heldout_cut(num_tokens: int, starts: np.ndarray[Any, Any], share: float) -> int:
    """Return the position at which a span's held-out end begins.

    Args:
        num_tokens: The length of the span.
        starts: The positions at which documents begin.
        share: The share of the span to hold out.

    Returns:
        The last start of a document before the end's exact share, or the exact position if there is none.
    """
    wanted = num_tokens - round(share * num_tokens)
    place = int(np.searchsorted(starts, wanted, side="right")) - 1
    return int(starts[place]) if place > 0 else wanted
