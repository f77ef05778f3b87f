"""index.json: the contents of a finished folder of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsity.common.files import aside
from train.data.pack import SPLITS, STARTS_DTYPE, Job, id_dtype
from train.data.skipped import MOST_PLACES

INDEX = "index.json"
COUNTS = "counts.npy"


def write_index(folder: Path, jobs: Sequence[Job], vocab_size: int, separator: int, tokenizer_key: str) -> None:
    """Sum up the parts, which must all be done: write counts.npy (training tokens by id), then index.json.

    index.json has these keys:
        dtype, vocab_size, separator, tokenizer (a hash of its files);
        skipped: how many documents could not be read, and the first errors;
        splits: num_documents, num_tokens and num_bytes (UTF-8) of `train` and `heldout`;
        parts: for each split the names of the files of ids and of documents' starts, their counts and their sha256.

    Args:
        folder: The folder of tokens.
        jobs: The parts.
        vocab_size: The tokenizer's vocabulary size.
        separator: The id that ends a document if it has an eos.
        tokenizer_key: The hash of the tokenizer's files.
    """
    records = [json.loads(job.sidecar.read_text(encoding="utf-8")) for job in jobs]
    counts = np.zeros(vocab_size, np.int64)
    for job in jobs:
        counts += np.load(job.counts)
    with aside(folder / COUNTS) as partial, open(partial, "wb") as file:
        np.save(file, counts)
    totals = {
        split: {
            name: sum(record[split][name] for record in records)
            for name in ("num_documents", "num_tokens", "num_bytes")
        }
        for split in SPLITS
    }
    index = {
        "dtype": id_dtype(vocab_size).str,
        "vocab_size": vocab_size,
        "separator": separator,
        "tokenizer": tokenizer_key,
        "splits": totals,
        "skipped": {
            "count": sum(record["skipped"]["count"] for record in records),
            "first": [place for record in records for place in record["skipped"]["first"]][:MOST_PLACES],
        },
        "parts": [
            {
                split: {"file": job.tokens(split).name, "starts": job.starts(split).name, **record[split]}
                for split in SPLITS
            }
            for job, record in zip(jobs, records, strict=True)
        ],
    }
    with aside(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")


def read_index(folder: str | Path) -> dict[str, Any]:
    """Return the index of a prepared folder.

    Raises:
        ValueError: The folder has no index on this machine.
    """
    try:
        return json.loads(Path(folder, INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no prepared tokens on this machine: "
            "put data.cache_dir on storage that all machines of the run share."
        ) from None


def is_complete(folder: Path) -> bool:
    """Return whether the folder is finished and every file still has the size given in the index."""
    if not (folder / INDEX).exists() or not (folder / COUNTS).exists():
        return False
    index = read_index(folder)
    records = [part[split] for part in index["parts"] for split in SPLITS]
    try:
        return all(
            _has_size(folder, one, index["dtype"])
            and (folder / one["starts"]).stat().st_size == one["num_documents"] * STARTS_DTYPE.itemsize
            for one in records
        )
    except (FileNotFoundError, KeyError):
        return False


def _has_size(folder: Path, record: dict[str, Any], dtype: str) -> bool:
    """Return whether a file of ids is as long as its record says; a file from another tool may be longer."""
    size = (folder / record["file"]).stat().st_size
    needed = record.get("offset", 0) + record["num_tokens"] * np.dtype(record.get("dtype", dtype)).itemsize
    return size >= needed if "offset" in record else bool(size == needed)


def write_mixture_index(folder: Path, sources: Sequence[tuple[str, float]]) -> None:
    """Write counts and an index that names the files of several folders, one source after another.

    The counts are weighted so that each source has its share in them.

    Args:
        folder: Where to write.
        sources: The (folder, weight) of each source.
    """
    indices = [read_index(source) for source, _ in sources]
    total = sum(index["splits"]["train"]["num_tokens"] for index in indices)
    counts = np.zeros(indices[0]["vocab_size"])
    for (source, weight), index in zip(sources, indices, strict=True):
        share = weight / sum(weight for _, weight in sources)
        counts += np.load(Path(source, COUNTS)) * (share * total / max(1, index["splits"]["train"]["num_tokens"]))
    with aside(folder / COUNTS) as partial, open(partial, "wb") as file:
        np.save(file, counts.round().astype(np.int64))
    parts = [
        {
            split: record | {key: _beside(source, record[key]) for key in ("file", "starts")}
            for split, record in part.items()
        }
        for (source, _), index in zip(sources, indices, strict=True)
        for part in index["parts"]
    ]
    totals = {
        split: {name: sum(index["splits"][split][name] for index in indices) for name in indices[0]["splits"][split]}
        for split in SPLITS
    }
    index = indices[0] | {"splits": totals, "parts": parts, "skipped": {"count": 0, "first": []}}
    with aside(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")


def _beside(source: str, name: str) -> str:
    """Return a file's name relative to another folder of tokens; an absolute path stays as it is."""
    return name if Path(name).is_absolute() else f"../{Path(source).name}/{name}"
