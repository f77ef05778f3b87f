"""The index of tokens that other tools wrote: which ids are trained on, and which are held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.files import aside, sha256_of
from train.data.foreign import Span, checked_counts, document_starts
from train.data.index import COUNTS, INDEX
from train.data.pack import STARTS_DTYPE, id_dtype


def write_foreign_index(
    folder: Path,
    spans: Sequence[Span],
    *,
    vocab_size: int,
    separator: int,
    heldout_share: float,
    tokenizer_key: str,
    decode: Callable[[list[int]], str],
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
        decode: Turns ids into text, to count the bytes of the held-out part.
        hashes: The sha256 of each file of `spans`.
    """
    counts = np.zeros(vocab_size, np.int64)
    parts: list[dict[str, Any]] = []
    for number, span in enumerate(spans):
        counts += checked_counts(span, vocab_size)
        starts = document_starts(span, separator)
        cut = heldout_cut(span.num_tokens, starts, heldout_share)
        held = span.read(cut)
        counts -= np.bincount(held, minlength=vocab_size)
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
                "num_bytes": len(decode(held[held != separator].tolist()).encode()) if split == "heldout" else 0,
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
        "parts": parts,
    }
    with aside(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")


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
