"""Files that are whole or absent, and what they hold as a hash: the ground the cache stands on."""

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
    """The lock of a folder of the cache: held by the one process that writes to it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """`folder`, made by `build(new_folder)` unless it exists; whole or absent, whoever else builds it meanwhile."""
    if folder.exists():
        return folder
    with lock(folder):
        if not folder.exists():
            with folder_aside(folder) as partial:
                build(partial)
    return folder


def publish(made: Path, folder: Path) -> Path:
    """`folder` with the files of `made`; the folder's name stands for its content, so one that exists is kept."""

    def copy(partial: Path) -> None:
        # shutil.copytree would copy modes as well, and a temporary folder is its owner's alone.
        for file in (file for file in made.rglob("*") if file.is_file()):
            target = partial / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    return build_once(folder, copy)


def digest(value: object) -> str:
    """32 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def sha256_of_all(
    paths: Iterable[str | Path], memo: Path | None = None, least_remembered: int = MEMO_BYTES
) -> list[str]:
    """The sha256 of each file's bytes, read by all cores.

    Files of at least `least_remembered` bytes that have not been touched since (same inode, size and times) are taken from
    `memo`, a JSON file kept here for that: a corpus of terabytes is not read again at every start.
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
        # Where it cannot be written the files are read again next time.
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            with aside(memo) as partial:
                partial.write_text(json.dumps(elsewhere | remembered), encoding="utf-8")
    return hashes


def _read_memo(memo: Path) -> dict[str, str]:
    """What a memo holds; nothing where it is not there, cannot be read or was cut short: it can be made anew."""
    try:
        found = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: str, least_bytes: int) -> str | None:
    """What changes when a file does; None below `least_bytes`, and for a file touched just now: the clocks of file systems
    are coarse, and a second change within a tick would look like none."""
    stat = os.stat(path)
    touched = max(stat.st_mtime_ns, stat.st_ctime_ns)
    if stat.st_size < least_bytes or time.time_ns() - touched < SETTLED_NS:
        return None
    times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
    return f"{os.path.abspath(path)} {stat.st_dev} {stat.st_ino} {stat.st_size} {times}"
