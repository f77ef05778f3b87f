"""Files and folders that are whole or absent, even after a crash: written aside, synced to disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; a crash leaves the old file or the new one."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; sync the file written there and rename it to `path`, or remove it on error."""
    partial = _partial(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`; rename it to `folder` at the end, or remove it on error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder)
    partial.mkdir()
    try:
        yield partial
        publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Sync all of `partial` and rename it to `folder`, after removing an old folder of that name."""
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    remove_folder(folder)
    partial.rename(folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Rename the folder away in one step, then delete it, so that its name never holds half of its files."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write `text` (UTF-8) in place and wait until the disk has it."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until the disk has a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds or will hold `path`."""
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free


def check_room(path: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Raise a ValueError if the disk of `path` has too little room.

    Args:
        path: File or folder to write; it need not exist.
        num_bytes: Bytes to write.
        what: The thing that needs them, for the error: "the run's model and checkpoints".
        remedy: What the user can do besides freeing space.

    Raises:
        ValueError: Fewer than `num_bytes` are free.
    """
    free = free_bytes(path)
    if free < num_bytes:
        raise ValueError(
            f"{path} has {free / 1e9:.2f} GB free, but {what} needs {num_bytes / 1e9:.2f} GB: free some space, {remedy}."
        )


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
