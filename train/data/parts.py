"""Text files cut into parts that workers read on their own."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[".txt", ".jsonl", ".jsonl.gz", ".parquet"]
KINDS: tuple[Kind, ...] = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
MIN_PART_BYTES = 1 << 20
MAX_PART_BYTES = 64 << 20
BREAKS = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb"[ \t]"))


@dataclass(frozen=True)
class Part:
    """A piece of a file: bytes start..stop, or row groups start..stop of a parquet file; all of a gzip file."""

    path: str
    kind: Kind
    start: int
    stop: int
    num_bytes: int
    max_documents: int | None = None
    """Only so many documents from the front of the part; all where it is None."""


def find_files(path: str | Path) -> list[Path]:
    """The file itself, or the data files below a folder, sorted by relative name; files of other kinds are left out."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"data.path={path} does not exist: give a file or folder of {', '.join(KINDS)}.")
    if path.is_file():
        _kind_of(path)
        return [path]
    with explained(path):
        found = [Path(folder, name) for folder, _, names in os.walk(path, onerror=_raise) for name in names]
    files = sorted((file for file in found if file.name.endswith(KINDS)), key=lambda file: file.relative_to(path).parts)
    if not files:
        raise ValueError(f"data.path={path} holds no data: give a folder with {', '.join(KINDS)} files in it.")
    return files


def cut_files(files: Sequence[Path]) -> list[Part]:
    """Parts of 1 to 64 MiB, about 64 where that allows it; they follow from the files alone, not from the workers."""
    total = sum(file.stat().st_size for file in files)
    part_bytes = min(max(total // 64, MIN_PART_BYTES), MAX_PART_BYTES)
    return [part for file in files for part in cut_file(file, part_bytes)]


def cut_file(path: Path, part_bytes: int) -> list[Part]:
    """Parts of about `part_bytes`: text ends at a blank line, JSON at a line end, parquet at a row group's."""
    kind, num_bytes = _kind_of(path), path.stat().st_size
    if kind == ".parquet":
        return _cut_parquet(path, part_bytes)
    if kind == ".jsonl.gz" or num_bytes <= part_bytes:
        return [Part(str(path), kind, 0, num_bytes, num_bytes)]
    with explained(path), open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stops = list(text_cuts(data, part_bytes) if kind == ".txt" else _line_cuts(data, part_bytes))
    starts = [0, *stops[:-1]]
    return [Part(str(path), kind, start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]


def text_cuts(data: bytes | mmap.mmap, size: int) -> Iterator[int]:
    """Where pieces of `size` to 2 x `size` bytes end: at a blank line, else a line end, else a space, else anywhere.

    The last piece is the rest, at most 2 x `size`. Pieces never end inside a UTF-8 character.
    """
    start = 0
    while len(data) - start > 2 * size:
        lowest, highest = start + size, start + 2 * size
        for pattern in BREAKS:
            if (found := pattern.search(data, lowest, highest)) is not None:
                start = found.end()
                break
        else:
            start = highest
            while data[start] & 0xC0 == 0x80 and start > lowest:
                start -= 1
        yield start
    yield len(data)


def _line_cuts(data: mmap.mmap, size: int) -> Iterator[int]:
    stop = 0
    while stop < len(data):
        newline = data.find(b"\n", stop + size)
        stop = len(data) if newline < 0 else newline + 1
        yield stop


def _cut_parquet(path: Path, part_bytes: int) -> list[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with explained(path):
        try:
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
                sizes = [group.total_byte_size for group in groups]
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not a readable parquet file ({_one_line(error)}): write it anew.") from None
    parts, start, num_bytes = [], 0, 0
    for index, size in enumerate(sizes, 1):
        num_bytes += size
        if num_bytes >= part_bytes or index == len(sizes):
            parts.append(Part(str(path), ".parquet", start, index, num_bytes))
            start, num_bytes = index, 0
    return parts


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """What the operating system refuses becomes a sentence that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise ValueError(f"{path} cannot be read ({reason}): give a data.path that this user can read.") from None


def _kind_of(path: Path) -> Kind:
    for kind in KINDS:
        if path.name.endswith(kind):
            return kind
    raise ValueError(f"data.path={path} has a suffix that is not known: give {', '.join(KINDS)}.")


def _raise(error: OSError) -> None:
    raise error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
