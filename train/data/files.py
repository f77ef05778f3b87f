"""Files that are whole or absent, and what they hold as a hash: the ground the cache stands on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from train.data.pool import num_cores

MEMO_BYTES = 64 << 20


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name to write to: what lies there at the end becomes `path` in one step, and is removed after an error."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def lock(folder: Path) -> FileLock:
    """The lock of a folder of the cache: held by the one process that writes to it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """`folder`, made by `build(new_folder)` unless it exists; whole or absent, whoever else builds it meanwhile."""
    if folder.exists():
        return folder
    with lock(folder):
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
            partial.mkdir()
            try:
                build(partial)
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def publish(made: Path, folder: Path) -> Path:
    """`folder` with the files of `made`; the folder's name stands for its content, so one that exists is kept."""
    return build_once(folder, lambda partial: shutil.copytree(made, partial, dirs_exist_ok=True))


def digest(value: object) -> str:
    """32 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[str | Path], memo: Path | None = None) -> list[str]:
    """The sha256 of each file's bytes, read by all cores.

    Files above 64 MiB that have not been touched since (same inode, size and times) are taken from `memo`, a JSON
    file kept here for that: a corpus of terabytes is not read again at every start.
    """
    paths = [os.path.realpath(path) for path in paths]
    known: dict[str, str] = json.loads(memo.read_text()) if memo is not None and memo.exists() else {}

    def one(path: str) -> tuple[str, str | None]:
        stat = os.stat(path)
        if memo is None or stat.st_size < MEMO_BYTES:
            return sha256_of(path), None
        state = f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        return known.get(state) or sha256_of(path), state

    with ThreadPoolExecutor(num_cores()) as executor:
        hashes = list(executor.map(one, paths))
    new = {state: value for value, state in hashes if state is not None and state not in known}
    if memo is not None and new:
        memo.parent.mkdir(parents=True, exist_ok=True)
        with aside(memo) as partial:
            partial.write_text(json.dumps(known | new))
    return [value for value, _ in hashes]
