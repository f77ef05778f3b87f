"""Text files cut into parts that workers read independently."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal[".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd", ".json.gz", ".json.zst", ".csv", ".parquet"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHOLE_KINDS = tuple(kind for kind in KINDS if kind not in (".txt", ".jsonl", ".parquet"))
"""Kinds that are not cut: compressed files, and .csv, whose quoted fields may contain line ends."""
MIN_PART_BYTES = 1 << 20
MAX_PART_BYTES = 64 << 20
BREAKS = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb"[ \t]"))


@dataclass(frozen=True)
class Part:
    """A piece of a file: bytes start..stop, row groups start..stop of a parquet file, or a whole file."""

    path: str
    kind: Kind
    start: int
    stop: int
    num_bytes: int
    max_documents: int | None = None
    """The number of documents to read from the beginning of the part; None for all."""


def find_files(path: str | Path) -> list[Path]:
    """Return the file itself, or the data files below a folder, sorted by relative name.

    Links are followed. A file or folder with several names is read once, under the first of them. Names that begin with
    a dot are left out, and so are files of unknown kinds.

    Args:
        path: A file of a known kind, or a folder. A folder's own name may begin with a dot.

    Raises:
        ValueError: There is nothing to read, or a link below the folder is broken.
    """
    path = Path(path).expanduser()
    if not path.exists():
        state = f"is a link to {os.readlink(path)}, which" if path.is_symlink() else ""
        raise ValueError(
            " ".join(f"data.path={path} {state} does not exist: give a file or folder of {', '.join(KINDS)}.".split())
        )
    if not path.is_dir():
        _kind_of(path)
        _check_regular(path)
        return [path]
    with explained(path):
        files = [file for file in walk(path) if kind_of(file) is not None]
    for file in files:
        _check_regular(file)
    if not files:
        raise ValueError(f"data.path={path} holds no data: give a folder with {', '.join(KINDS)} files in it.")
    return files


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below `folder`, sorted by relative name; links are followed, and each real data file comes once.

    Names that begin with a dot are left out; files of unknown kinds are not.

    Raises:
        ValueError: A link is broken.
    """
    return _walk(folder, os.path.realpath(folder), seen={os.path.realpath(folder)})


def _walk(folder: Path, real_folder: str, seen: set[str]) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        path = folder / entry.name
        is_link = entry.is_symlink()
        if is_link and not os.path.exists(path):
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which cannot be reached: mend or remove it.")
        # The path may lead through a linked folder, so a plain name is resolved in the real folder.
        real = os.path.realpath(path) if is_link else os.path.join(real_folder, entry.name)
        is_folder = entry.is_dir()
        if not is_folder and kind_of(path) is None:
            yield path
        elif real not in seen:
            seen.add(real)
            yield from _walk(path, real, seen) if is_folder else [path]


def cut_files(files: Sequence[Path]) -> list[Part]:
    """Cut files into parts of 1 to 64 MiB, about 64 parts if possible; the cuts depend only on the files."""
    total = sum(file.stat().st_size for file in files)
    part_bytes = min(max(total // 64, MIN_PART_BYTES), MAX_PART_BYTES)
    return [part for file in files for part in cut_file(file, part_bytes)]


def cut_file(path: Path, part_bytes: int) -> list[Part]:
    """Cut a file into parts of about `part_bytes`, which end at a blank line, a JSON line or a parquet row group."""
    kind, num_bytes = _kind_of(path), path.stat().st_size
    if kind == ".parquet":
        return _cut_parquet(path, part_bytes)
    if kind in WHOLE_KINDS or num_bytes <= part_bytes:
        return [Part(str(path), kind, 0, num_bytes, num_bytes)]
    with explained(path), open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stops = list(text_cuts(data, part_bytes) if kind == ".txt" else _line_cuts(data, part_bytes))
    starts = [0, *stops[:-1]]
    return [Part(str(path), kind, start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]


def text_cuts(data: bytes | mmap.mmap, size: int) -> Iterator[int]:
    """Yield the ends of pieces of `size` to 2 x `size` bytes: at a blank line, else a line end, a space, or anywhere.

    The last piece is the rest, at most 2 x `size` bytes. A piece never ends inside a UTF-8 character.
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
            raise ValueError(f"{path} is not a readable parquet file ({_one_line(error)}): write it again.") from None
    parts, start, num_bytes = [], 0, 0
    for index, size in enumerate(sizes, 1):
        num_bytes += size
        if num_bytes >= part_bytes or index == len(sizes):
            parts.append(Part(str(path), ".parquet", start, index, num_bytes))
            start, num_bytes = index, 0
    return parts


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn errors of the operating system into a sentence that names the file.

    Raises:
        ValueError: The enclosed code raised an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # Arrow raises an OSError without errno for a damaged file.
            raise ValueError(f"{path} is damaged ({_one_line(error)}): write it again.") from None
        reason, place = error.strerror or _one_line(error), error.filename or path
        raise ValueError(f"{place} cannot be read ({reason}): give a data.path that this user can read.") from None


def kind_of(path: Path) -> Kind | None:
    """Return the kind that the file's suffix names, in upper or lower case; None for an unknown suffix."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _kind_of(path: Path) -> Kind:
    if (kind := kind_of(path)) is None:
        raise ValueError(f"data.path={path} has a suffix that is not known: give {', '.join(KINDS)}.")
    return kind


def _check_regular(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder, so it cannot be read twice: put a file in its place.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
