"""Tokens written by other tools: Megatron's .bin with its .idx, flat .bin and .npy, and datasets saved to disk.

The files are read in place. Only an index is written, which says for each file where its ids are, what type they have, and
where documents begin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.parts import explained, walk
from train.data.spans import Span, dataset_spans

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
NPY_MAGIC = b"\x93NUMPY"
FLAT_SUFFIXES = (".bin", ".npy")
DATASET_FILES = ("state.json", "dataset_info.json")
DICT_FILE = "dataset_dict.json"
TYPES = {"uint16": "<u2", "uint32": "<u4"}
"""The values of data.token_dtype, and numpy's names for them."""
CHUNK = 1 << 24


def holds_tokens(path: str | Path) -> bool:
    """Return whether a file or folder holds token ids, judged only by file names."""
    path = Path(path).expanduser()
    if path.is_dir():
        is_saved = _is_dataset(path) or (path / DICT_FILE).is_file()
        return is_saved or any(file.suffix in FLAT_SUFFIXES for file in walk(path))
    return path.suffix in FLAT_SUFFIXES


def find_token_files(path: str | Path) -> list[Path]:
    """Return a .bin or .npy file, all of them below a folder in the order of their names, or a saved dataset's files.

    Raises:
        ValueError: There are none.
    """
    path = Path(path).expanduser()
    if not path.exists():
        prefixed = f"{path}.bin"
        remedy = (
            f"give data.path={prefixed}" if Path(prefixed).exists() else "give a .bin or .npy file, or a folder of them"
        )
        raise ValueError(f"data.path={path} does not exist: {remedy}.")
    with explained(path):
        if path.is_dir() and _is_dataset(path):
            return _dataset_files(path)
        if (path / DICT_FILE).is_file():
            splits = json.loads((path / DICT_FILE).read_text(encoding="utf-8"))["splits"]
            raise ValueError(
                f"data.path={path} holds the splits {', '.join(splits)}: give one of them, data.path={path}/{splits[0]}."
            )
        files = [file for file in walk(path) if file.suffix in FLAT_SUFFIXES] if path.is_dir() else [path]
    if not files or files[0].suffix not in FLAT_SUFFIXES:
        raise ValueError(
            f"data.path={path} holds no tokens: give .bin or .npy files, or a folder that Dataset.save_to_disk wrote."
        )
    for file in files:
        if file.name == "val.bin" and (train := file.with_name("train.bin")) in files:
            raise ValueError(
                f"data.path={path} would train on the held-out tokens of {file}: give data.path={train}, and score the "
                f"others with eval.sets=[{{path: {file}}}]."
            )
    return files


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
    files = find_token_files(path)
    # An index names these files, and is not in the folder from which the run was started.
    path, files = path.absolute(), [file.absolute() for file in files]
    with explained(path):
        if path.is_dir() and _is_dataset(path):
            return [span for file in files for span in dataset_spans(file)]
        flat = TYPES[dtype] if dtype else ("<u2" if vocab_size <= 1 << 16 else "<u4")
        return [span for file in files for span in _file_spans(file, flat)]


def files_of(path: str | Path) -> list[Path]:
    """Return all files whose contents determine the ids; a hash of them identifies the ids."""
    path = Path(path).expanduser().absolute()
    files = find_token_files(path)
    if path.is_dir() and _is_dataset(path):
        return [*files, *(path / name for name in DATASET_FILES)]
    return sorted({*files, *(index for file in files if (index := file.with_suffix(".idx")).exists())})


def _is_dataset(folder: Path) -> bool:
    return all((folder / name).is_file() for name in DATASET_FILES)


def _dataset_files(folder: Path) -> list[Path]:
    state = json.loads((folder / DATASET_FILES[0]).read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} is a selection of rows that an old version of datasets saved: load it, and save it again with a "
            "newer one."
        )
    return [folder / entry["filename"] for entry in state["_data_files"]]


def _file_spans(file: Path, flat: str) -> Iterator[Span]:
    index = file.with_suffix(".idx")
    if file.suffix == ".bin" and index.exists():
        yield _megatron(file, index)
        return
    with open(file, "rb") as opened:
        is_array = opened.read(len(NPY_MAGIC)) == NPY_MAGIC
    if is_array:
        try:
            array: Any = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{file} is not a complete array of ids ({error}): write it again.") from None
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
    if documents and not (int(begins.min()) >= 0 and int(begins.max()) <= sequences):
        raise ValueError(f"{index} names sequences that it does not have ({sequences} in all): copy it again.")
    width = np.dtype(dtype).itemsize
    if int(ends[-1]) * width != file.stat().st_size or not np.array_equal(places, ends[:-1] * width):
        raise ValueError(f"{index} does not match {file.name}, which has {file.stat().st_size} bytes: copy both again.")
    return Span(str(file), 0, dtype, int(ends[-1]), ends[begins[:-1] if documents else []])


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
        return np.unique(span.starts[span.starts < span.num_tokens])
    pieces = [np.zeros(1, np.int64)]
    for start in range(0, span.num_tokens, CHUNK):
        ids = span.read(start, min(start + CHUNK, span.num_tokens))
        pieces.append(np.flatnonzero(ids == separator) + start + 1)
    starts = np.concatenate(pieces)
    return starts[starts < span.num_tokens]
