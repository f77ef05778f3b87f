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


def sha256_of_all(
    paths: Iterable[str | Path], memo: Path | None = None, least_remembered: int = MEMO_BYTES
) -> list[str]:
    """The sha256 of each file's bytes, read by all cores.

    Files of at least `least_remembered` bytes that have not been touched since (same inode, size and times) are taken from
    `memo`, a JSON file kept here for that: a corpus of terabytes is not read again at every start.
    """
    names = [os.path.abspath(path) for path in paths]
    known: dict[str, str] = {} if memo is None else _read_memo(memo)
    states = [_state(path, least_remembered) if memo is not None else None for path in names]
    new = [path for path, state in zip(names, states, strict=True) if state not in known]
    with ThreadPoolExecutor(num_cores()) as executor:
        found = dict(zip(new, executor.map(sha256_of, new), strict=True))
    hashes = [found[path] if path in found else known[str(state)] for path, state in zip(names, states, strict=True)]
    remembered = {state: value for state, value in zip(states, hashes, strict=True) if state is not None}
    if memo is not None and not remembered.keys() <= known.keys():
        here = set(names)
        elsewhere = {state: value for state, value in known.items() if state.rsplit(" ", 4)[0] not in here}
        memo.parent.mkdir(parents=True, exist_ok=True)
        with aside(memo) as partial:
            partial.write_text(json.dumps(elsewhere | remembered))
    return hashes


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(memo.read_text())
    except (FileNotFoundError, ValueError):
        # Not there yet, or cut short by a crash of the machine: it can be made anew.
        return {}
    return found


def _state(path: str, least_bytes: int) -> str | None:
    """What changes when a file does; None below `least_bytes`."""
    stat = os.stat(path)
    if stat.st_size < least_bytes:
        return None
    return f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
