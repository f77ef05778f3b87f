"""Datasets given by a hub name, or by a local folder in the same layout; `datasets` finds the files of a split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from train.data import hub
from train.data.documents import MISSING, checked_text, field_of
from train.data.files import build_once, digest
from train.data.parts import KINDS, find_files, kind_of

LINES_PER_FILE = 50_000


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
    with _explained(asked):
        builder = _builder(asked)
        files = [str(file) for file in (builder.config.data_files or {}).get(asked.split, [])]
        splits = list(builder.config.data_files or {})
    if not files:
        raise ValueError(
            f"{asked} has no split {asked.split}, only {', '.join(splits) or 'none'}: give one of its splits in "
            "data.split."
        )
    if unread := next((file for file in files if kind_of(Path(file)) is None), None):
        raise ValueError(
            f"{asked} consists of files such as {unread.rpartition('/')[2]}, but only {', '.join(KINDS)} can be read: set "
            "data.stream=true to read it through the datasets library."
        )
    if asked.folder is not None:
        return None, [Path(file) for file in files]
    with _explained(asked):
        return digest(files), [_downloaded(file) for file in files]


def streamed(asked: Asked, text_field: str, max_documents: int | None, cache: Path) -> tuple[str, list[Path]]:
    """Stream the first documents over the network and return (key, jsonl files); the dataset's own files are not kept.

    Args:
        asked: The requested dataset.
        text_field: The field that holds a document's text.
        max_documents: The number of documents; None for all.
        cache: The cache folder, in which the jsonl files are written once.

    Raises:
        ValueError: The dataset cannot be read.
    """
    with _explained(asked):
        builder = _builder(asked)
        files = [str(file) for file in (builder.config.data_files or {}).get(asked.split, [])]
        key = digest([*astuple(asked), str(builder.hash), files, text_field, max_documents])

        def build(folder: Path) -> None:
            rows = builder.as_streaming_dataset(asked.split)
            texts = (_text(row, text_field, place) for place, row in enumerate(islice(rows, max_documents)))
            for index, lines in enumerate(_groups(texts, LINES_PER_FILE)):
                file = folder / f"part-{index:05}.jsonl"
                file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in lines), encoding="utf-8")

        return key, find_files(build_once(cache / "documents" / key, build))


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


def _text(row: dict[str, Any], text_field: str, place: int) -> str:
    value = field_of(row, text_field)
    if value is MISSING:
        raise ValueError(f"row {place} has no field {text_field}: name the field with the text in data.text_field")
    return checked_text(value, text_field)


def _groups(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while group := list(islice(texts, size)):
        yield group


class _explained:
    """A context that turns errors of `datasets` and of the hub into one sentence."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            remedy = (
                "give one of its subsets and splits"
                if self.asked.folder
                else "connect to the network, or give a folder"
            )
            raise ValueError(f"{self.asked} cannot be read ({reason}): {remedy}.") from None
