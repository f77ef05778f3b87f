"""Cache files that are complete or absent, and hashes of file contents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from sparsity.common.files import aside, folder_aside, sha256_of
from train.data.pool import num_cores

MEMO_BYTES = 64 << 20
SETTLED_NS = 2_000_000_000


def lock(folder: Path) -> FileLock:
    """Return the lock of a cache folder; the one process that writes to the folder holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Return `folder`, built by `build(new_folder)` unless it exists.

    The folder is complete or absent, even if another process builds it at the same time.
    """
    if folder.exists():
        return folder
    with lock(folder):
        if not folder.exists():
            with folder_aside(folder) as partial:
                build(partial)
    return folder


def publish(made: Path, folder: Path) -> Path:
    """Copy the files of `made` to `folder` unless that exists, and return `folder`; its name identifies its content."""

    def copy(partial: Path) -> None:
        # shutil.copytree would also copy modes, and a temporary folder is accessible only to its owner.
        for file in (file for file in made.rglob("*") if file.is_file()):
            target = partial / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    return build_once(folder, copy)


def digest(value: object) -> str:
    """Return 32 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def sha256_of_all(
    paths: Iterable[str | Path], memo: Path | None = None, least_remembered: int = MEMO_BYTES
) -> list[str]:
    """Return the sha256 of each file's bytes, computed on all cores.

    Hashes of files of at least `least_remembered` bytes are remembered in `memo`, a JSON file. Files that are unchanged
    since (same inode, size and times) are not read again, which matters for a corpus of terabytes.

    Args:
        paths: The files.
        memo: The JSON file; None to remember nothing.
        least_remembered: The size in bytes from which a file is remembered.
    """
    given = [os.fspath(path) for path in paths]
    known = {} if memo is None else _read_memo(memo)
    states = [_state(path, least_remembered) if memo is not None else None for path in given]
    new = [path for path, state in zip(given, states, strict=True) if state not in known]
    with ThreadPoolExecutor(num_cores()) as executor:
        found = dict(zip(new, executor.map(sha256_of, new), strict=True))
    hashes = [found[path] if path in found else known[str(state)] for path, state in zip(given, states, strict=True)]
    remembered = {state: value for state, value in zip(states, hashes, strict=True) if state is not None}
    if memo is not None and not remembered.keys() <= known.keys():
        here = {os.path.abspath(path) for path in given}
        elsewhere = {state: value for state, value in known.items() if state.rsplit(" ", 5)[0] not in here}
        # If the memo cannot be written, the files are read again next time.
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            with aside(memo) as partial:
                partial.write_text(json.dumps(elsewhere | remembered), encoding="utf-8")
    return hashes


def _read_memo(memo: Path) -> dict[str, str]:
    """Return the contents of a memo; an empty one if it is missing, unreadable or cut short, since it can be rebuilt."""
    try:
        found = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: str, least_bytes: int) -> str | None:
    """Return a string that changes when the file does.

    The result is None for a file smaller than `least_bytes`, and for one that changed just now: file system clocks are
    coarse, and a second change within the same tick would go unnoticed.
    """
    stat = os.stat(path)
    touched = max(stat.st_mtime_ns, stat.st_ctime_ns)
    if stat.st_size < least_bytes or time.time_ns() - touched < SETTLED_NS:
        return None
    times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
    return f"{os.path.abspath(path)} {stat.st_dev} {stat.st_ino} {stat.st_size} {times}"
