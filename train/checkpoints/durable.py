"""Files that survive a crash: written aside, synced to the disk, and renamed, so whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write aside, sync and rename: the file is whole or not there."""
    aside = path.with_name(f"{path.name}.tmp")
    write_synced(aside, text)
    aside.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(aside: Path, folder: Path) -> None:
    """Sync every file of `aside` and rename it to `folder`, in whose place nothing half-removed is ever seen."""
    for path in aside.rglob("*"):
        if path.is_file():
            sync_file(path)
    sync_folder(aside)
    remove_folder(folder)
    aside.rename(folder)
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Take the folder's name away in one step, then its files."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
