"""Datasets given by a hub name, or by a local folder in the same layout; `datasets` finds the files of a split."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sparsity.common.files import publish_folder, write_atomically
from train.data import hub
from train.data.fields import MISSING, checked_text, field_of
from train.data.files import digest, lock
from train.data.parts import KINDS, find_files, kind_of
from train.data.pool import Progress

LINES_PER_FILE = 50_000
STATE = "state.json"
"""The place from which an interrupted stream resumes."""


@dataclass(frozen=True)
class Asked:
    """A requested dataset: its name or folder, its subset and split."""

    name: str
    subset: str | None
    split: str

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a name on the hub."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    def __str__(self) -> str:
        return f"data.name={self.name}" + (f" data.subset={self.subset}" if self.subset else "")


def data_files(asked: Asked) -> tuple[str | None, list[Path]]:
    """Return (key of the split's content, its files on this machine); files on the hub are downloaded.

    The key is None for local files: the caller must hash their contents.

    Raises:
        ValueError: There is no such dataset, subset or split, it cannot be reached, or its files are of a kind that
            cannot be read.
    """
    files = listed_files(asked)
    if unread := next((file for file in files if kind_of(Path(file)) is None), None):
        raise ValueError(
            f"{asked} consists of files such as {unread.rpartition('/')[2]}, but only {', '.join(KINDS)} can be read: set "
            "data.stream=true to read it through the datasets library."
        )
    if asked.folder is not None:
        return None, [Path(file) for file in files]
    with _explained(asked):
        return digest(files), [_downloaded(file) for file in files]


def listed_files(asked: Asked) -> list[str]:
    """Return the paths or addresses of a split's files; nothing is downloaded.

    Raises:
        ValueError: There is no such dataset, subset or split, or it cannot be reached.
    """
    with _explained(asked):
        builder = _builder(asked)
    return _files_of(builder, asked)


def _files_of(builder: Any, asked: Asked) -> list[str]:
    splits = builder.config.data_files or {}
    if not splits.get(asked.split):
        raise ValueError(
            f"{asked} has no split {asked.split}, only {', '.join(splits) or 'none'}: give one of its splits in "
            "data.split."
        )
    return [str(file) for file in splits[asked.split]]


def streamed(
    asked: Asked, text_field: str, max_documents: int | None, cache: Path, skips_errors: bool = False
) -> tuple[str, list[Path]]:
    """Stream the first documents over the network and return (key, jsonl files); the dataset's own files are not kept.

    After an interruption it continues with the last file of `LINES_PER_FILE` documents that was not complete.

    Args:
        asked: The requested dataset.
        text_field: The field that holds a document's text.
        max_documents: The number of documents; None for all.
        cache: The cache folder, in which the jsonl files are written once.
        skips_errors: Whether documents without text are skipped: they become lines without text, so that they are
            counted when the files are read.

    Raises:
        ValueError: The dataset cannot be read.
    """
    with _explained(asked):
        builder = _builder(asked)
    files = _files_of(builder, asked)
    key = digest([*astuple(asked), str(builder.hash), files, text_field, max_documents] + ["skip"] * skips_errors)
    folder = cache / "documents" / key
    with lock(folder), _explained(asked):
        if not folder.exists():
            partial = folder.with_name(f".{key}.streaming")
            partial.mkdir(exist_ok=True)
            rows = builder.as_streaming_dataset(asked.split)
            _write_rows(rows, partial, max_documents, lambda row, number: _line(row, text_field, number, skips_errors))
            publish_folder(partial, folder)
    return key, find_files(folder)


def _write_rows(rows: Any, folder: Path, max_documents: int | None, line: Callable[[Any, int], str]) -> None:
    """Write files of lines, and after each of them the place from which to resume."""
    state = folder / STATE
    num_files, num_rows = 0, 0
    if state.exists():
        known = json.loads(state.read_text(encoding="utf-8"))
        num_files, num_rows = known["num_files"], known["num_rows"]
        rows.load_state_dict(known["rows"])
    wanted = None if max_documents is None else max_documents - num_rows
    with Progress("stream documents", max_documents or 0) as progress:
        progress.add(num_rows)
        taken = islice(rows, wanted)
        while lines := [line(row, num_rows + number) for number, row in enumerate(islice(taken, LINES_PER_FILE))]:
            write_atomically(folder / f"part-{num_files:05}.jsonl", "".join(lines))
            num_files, num_rows = num_files + 1, num_rows + len(lines)
            progress.add(len(lines))
            place = {"num_files": num_files, "num_rows": num_rows, "rows": rows.state_dict()}
            write_atomically(state, json.dumps(place))
    state.unlink(missing_ok=True)


def _line(row: dict[str, Any], text_field: str, number: int, skips_errors: bool) -> str:
    """Return a row's text as a line of JSON."""
    value = field_of(row, text_field)
    try:
        if value is MISSING:
            raise ValueError(f"has no field {text_field}: name the field with the text in data.text_field.")
        text = checked_text(value, text_field)
    except ValueError as error:
        if skips_errors:
            return json.dumps({"row": number}) + "\n"
        raise ValueError(f"row {number} {error}") from None
    return json.dumps({"text": text}) + "\n"


def _builder(asked: Asked) -> Any:
    from datasets import load_dataset_builder

    if asked.folder is not None:
        # If no README lists subsets, a subset is a folder.
        lists_subsets = "configs:" in _readme(asked.folder)
        if asked.subset and not lists_subsets and (asked.folder / asked.subset).is_dir():
            return load_dataset_builder(str(asked.folder / asked.subset))
        return load_dataset_builder(str(asked.folder), asked.subset)
    if not hub.is_reachable():
        raise ConnectionError("it does not answer")
    return load_dataset_builder(asked.name, asked.subset)


def _readme(folder: Path) -> str:
    file = folder / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _downloaded(file: str) -> Path:
    """Return the local copy of a hub file from the hub's own cache; its address names the commit."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    place: Any = HfFileSystem().resolve_path(file)
    return Path(hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision))


class _explained:
    """A context that turns errors of `datasets` and of the hub into one sentence."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # A full or read-only disk of ours has nothing to do with the dataset.
        is_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)
        if isinstance(error, Exception) and not is_disk:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            remedy = (
                "give one of its subsets and splits"
                if self.asked.folder
                else "connect to the network, or give a folder"
            )
            raise ValueError(f"{self.asked} cannot be read ({reason}): {remedy}.") from None
