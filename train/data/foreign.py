"""Tokens written by other tools: Megatron's .bin with its .idx, flat .bin and .npy, and datasets saved to disk.

The files are read in place. Only an index is written, which says for each file where its ids are, what type they have, and
where documents begin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.parts import explained

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
NPY_MAGIC = b"\x93NUMPY"
FLAT_SUFFIXES = (".bin", ".npy")
DATASET_FILES = ("state.json", "dataset_info.json")
COLUMN = "input_ids"
TYPES = {"uint16": "<u2", "uint32": "<u4"}
"""The values of data.token_dtype, and numpy's names for them."""
CHUNK = 1 << 24


@dataclass(frozen=True)
class Span:
    """A stretch of consecutive ids in a file."""

    file: str
    offset: int
    """The offset of the first id in bytes."""
    dtype: str
    num_tokens: int
    starts: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)
    """The positions at which documents begin; None if only the separators between documents show them."""

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return the ids start..stop-1 as a view of the file."""
        width = np.dtype(self.dtype).itemsize
        data = np.memmap(self.file, np.uint8, mode="r", offset=0)
        ids = data[self.offset : self.offset + self.num_tokens * width].view(self.dtype)
        return ids[start : self.num_tokens if stop is None else stop]


def holds_tokens(path: str | Path) -> bool:
    """Return whether a file or folder holds token ids, judged only by file names."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _is_dataset(path) or any(file.suffix in FLAT_SUFFIXES for file in path.iterdir())
    return path.suffix in FLAT_SUFFIXES


def find_spans(path: str | Path, vocab_size: int, dtype: str | None) -> list[Span]:
    """Return the spans of ids in a file or folder, in the order of the files' names.

    Args:
        path: A .bin or .npy file, a folder of them, or a folder that `Dataset.save_to_disk` wrote.
        vocab_size: The tokenizer's vocabulary size, which decides between two and four bytes for a flat file if
            `dtype` is None.
        dtype: A key of `TYPES`.

    Raises:
        ValueError: There are no ids, or a file does not have the format that its name suggests.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"data.path={path} does not exist: give a .bin or .npy file, or a folder with tokens.")
    # An index names these files, and is not in the folder from which the run was started.
    path = path.absolute()
    with explained(path):
        if path.is_dir() and _is_dataset(path):
            return list(_dataset_spans(path))
        files = sorted(file for file in path.iterdir() if file.suffix in FLAT_SUFFIXES) if path.is_dir() else [path]
        if not files or files[0].suffix not in FLAT_SUFFIXES:
            raise ValueError(
                f"data.path={path} holds no tokens: give .bin or .npy files, or a folder that Dataset.save_to_disk wrote."
            )
        flat = TYPES[dtype] if dtype else ("<u2" if vocab_size <= 1 << 16 else "<u4")
        return [span for file in files for span in _file_spans(file, flat)]


def files_of(path: str | Path) -> list[Path]:
    """Return all files whose contents determine the ids; a hash of them identifies the ids."""
    path = Path(path).expanduser().absolute()
    if path.is_dir():
        suffixes = (*FLAT_SUFFIXES, ".idx", ".arrow", ".json")
        return sorted(file for file in path.iterdir() if file.suffix in suffixes)
    index = path.with_suffix(".idx")
    return [path, index] if index.exists() else [path]


def _is_dataset(folder: Path) -> bool:
    return all((folder / name).is_file() for name in DATASET_FILES)


def _file_spans(file: Path, flat: str) -> Iterator[Span]:
    index = file.with_suffix(".idx")
    if file.suffix == ".bin" and index.exists():
        yield _megatron(file, index)
        return
    with open(file, "rb") as opened:
        is_array = opened.read(len(NPY_MAGIC)) == NPY_MAGIC
    if is_array:
        array: Any = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{file} is an array {array.dtype}{list(array.shape)}: give a one-dimensional array of ids."
            )
        yield Span(str(file), array.offset, array.dtype.str, len(array))
        return
    width, size = np.dtype(flat).itemsize, file.stat().st_size
    if size % width:
        raise ValueError(
            f"{file} has {size} bytes, which is not a whole number of ids of {width} bytes: set data.token_dtype to the "
            f"type it was written in, {' or '.join(TYPES)}."
        )
    yield Span(str(file), 0, flat, size // width)


def _megatron(file: Path, index: Path) -> Span:
    """Read Megatron's index: a magic word, a version, the ids' type, lengths and places of sequences, documents."""
    data = index.read_bytes()
    if not data.startswith(MEGATRON_MAGIC) or len(data) < 34:
        raise ValueError(f"{index} does not begin like Megatron's index: remove it if {file.name} is a flat file.")
    code = data[17]
    sequences, documents = (int(count) for count in np.frombuffer(data, "<u8", 2, 18))
    dtype = MEGATRON_TYPES.get(code)
    if dtype is None or np.dtype(dtype).kind not in "iu":
        raise ValueError(
            f"{index} gives the ids type {code}, which is not an integer type for ids: write the files again."
        )
    needed = 34 + 12 * sequences + 8 * documents
    if len(data) < needed:
        raise ValueError(f"{index} has {len(data)} bytes, but its {sequences} sequences need {needed}: copy it again.")
    lengths = np.frombuffer(data, "<i4", sequences, 34).astype(np.int64)
    places = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    begins = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    width = np.dtype(dtype).itemsize
    if int(ends[-1]) * width != file.stat().st_size or not np.array_equal(places, ends[:-1] * width):
        raise ValueError(f"{index} does not match {file.name}, which has {file.stat().st_size} bytes: copy both again.")
    return Span(str(file), 0, dtype, int(ends[-1]), ends[begins[:-1] if documents else []])


def _dataset_spans(folder: Path) -> Iterator[Span]:
    import pyarrow as pa

    names = [
        entry["filename"] for entry in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    ]
    for name in names:
        with pa.memory_map(str(folder / name)) as source:
            base = source.read_buffer().address
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            if COLUMN not in reader.schema.names:
                raise ValueError(
                    f"{folder} has no column {COLUMN}, only {', '.join(reader.schema.names)}: save the ids in one."
                )
            for batch in reader:
                column = batch.column(COLUMN)
                ids = column.flatten()
                if column.null_count or ids.null_count or not pa.types.is_integer(ids.type):
                    raise ValueError(
                        f"{folder} has a column {COLUMN} of type {column.type} or with nulls: give lists of ids."
                    )
                dtype = np.dtype(ids.type.to_pandas_dtype()).newbyteorder("<")
                starts = np.asarray(column.offsets)[:-1].astype(np.int64)
                offset = ids.buffers()[1].address + ids.offset * dtype.itemsize - base
                yield Span(
                    str(folder / name), offset, dtype.str, len(ids), starts - starts[0] if len(starts) else starts
                )


def checked_counts(span: Span, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each id occurs in a span [vocab_size].

    Raises:
        ValueError: An id is outside the vocabulary, or the file seems to be read with the wrong type.
    """
    counts = np.zeros(vocab_size, np.int64)
    odd = 0
    for start in range(0, span.num_tokens, CHUNK):
        ids = span.read(start, min(start + CHUNK, span.num_tokens))
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"{span.file} holds the id {wrong}, but the tokenizer has {vocab_size} ids: give the tokenizer that wrote "
                f"it, or the type of its ids in data.token_dtype ({' or '.join(TYPES)})."
            )
        counts += np.bincount(ids, minlength=vocab_size)
        odd += int(np.count_nonzero(ids[1::2]))
    if span.dtype == "<u2" and span.num_tokens >= 16 and odd == 0 and counts[1:].any():
        raise ValueError(
            f"{span.file} has a 0 in every other position, as ids of four bytes would: set data.token_dtype=uint32."
        )
    return counts


def document_starts(span: Span, separator: int) -> NDArray[np.int64]:
    """Return the positions at which documents begin: from the file's index, or else after each separator."""
    if span.starts is not None:
        return np.unique(span.starts)
    pieces = [np.zeros(1, np.int64)]
    for start in range(0, span.num_tokens, CHUNK):
        ids = span.read(start, min(start + CHUNK, span.num_tokens))
        pieces.append(np.flatnonzero(ids == separator) + start + 1)
    starts = np.concatenate(pieces)
    return starts[starts < span.num_tokens]
