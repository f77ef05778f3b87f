"""The text of one source: files of documents, and a key that identifies their content."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import DataConfig
from train.data import dataset, fineweb, pydocs
from train.data.documents import limit_parts
from train.data.files import build_once, digest, sha256_of_all
from train.data.parts import KINDS, Part, cut_files, explained, find_files, kind_of, walk


@dataclass(frozen=True)
class Corpus:
    """The files of one source and the way to read them."""

    key: str
    """A key that is equal for equal content, regardless of the files' names and folders."""
    files: tuple[Path, ...]
    text_field: str
    max_documents: int | None
    skips_errors: bool = False

    def parts(self) -> list[Part]:
        """Return the parts to tokenize, cut off after `max_documents` documents."""
        parts = cut_files(self.files)
        if self.max_documents is None:
            return parts
        return limit_parts(parts, self.text_field, self.max_documents, self.skips_errors)


def find_corpus(config: DataConfig, cache: Path) -> Corpus:
    """Return the corpus of the configured source; docstrings are parsed and hub data is fetched, unless done before."""
    key, files, text_field = _key_and_files(config, cache)
    skips_errors = config.on_error == "skip"
    # With another word in its place, tokens that an earlier version cut off at a spoilt row of a CSV file are not found.
    whole_key = [key, text_field, config.max_documents] + ["skip rows"] * skips_errors
    return Corpus(digest(whole_key), tuple(files), text_field, config.max_documents, skips_errors)


def _key_and_files(config: DataConfig, cache: Path) -> tuple[str, Sequence[Path], str]:
    """Return (key of the content, files, field of the text)."""
    skips_errors = config.on_error == "skip"
    if config.source == "pydocs":
        return *pydocs_files(pydocs.default_roots(), cache, config.num_workers), "text"
    if config.source == "hub":
        assert config.name is not None
        asked = dataset.Asked(config.name, config.subset, config.split)
        if config.stream:
            return *dataset.streamed(asked, config.text_field, config.max_documents, cache, skips_errors), "text"
        key, files = dataset.data_files(asked)
        return key or content_key(files, cache), files, config.text_field
    if config.source == "fineweb_edu" and config.path is None:
        return *fineweb.hub_files(config.subset, config.max_documents, cache, skips_errors), "text"
    assert config.path is not None
    if config.source == "fineweb_edu":
        files = fineweb.local_files(config.path, config.subset)
        return content_key(files, cache), files, "text"
    files = find_files(config.path)
    if sentence := left_out(config.path):
        print(sentence, file=sys.stderr, flush=True)
    return content_key(files, cache), files, config.text_field


def left_out(path: str) -> str | None:
    """Return a sentence about a folder's files that are ignored because their kind is unknown; None if there are none."""
    folder = Path(path).expanduser()
    others = [file for file in walk(folder) if kind_of(file) is None] if folder.is_dir() else []
    if not others:
        return None
    count = "1 file that is not" if len(others) == 1 else f"{len(others)} files that are not"
    return f"data.path={path}: left out {count} {', '.join(KINDS)}, such as {others[0].relative_to(folder)}."


def content_key(files: Sequence[Path], cache: Path) -> str:
    """Return a hash of the files' contents, in order, and of their kinds."""
    with explained(os.path.commonpath(files)):
        hashes = sha256_of_all(files, memo=cache / "sha256.json")
    return digest([[file.suffixes[-1].lower(), value] for file, value in zip(files, hashes, strict=True)])


def pydocs_files(roots: Sequence[str | Path], cache: Path, num_workers: int | None) -> tuple[str, list[Path]]:
    """Return (key, jsonl files) of the docstrings below the roots; the key hashes every Python file that is read.

    Args:
        roots: Folders with Python packages.
        cache: The cache folder, in which the jsonl files are written once.
        num_workers: The number of processes; None for all cores.
    """
    sources = pydocs.find_sources(roots)
    # Hashing thousands of small files would take a second or more at every start, so all of them are remembered.
    hashes = sha256_of_all((source.path for source in sources), memo=cache / "pydocs.sha256.json", least_remembered=0)
    modules = [[source.module, value] for source, value in zip(sources, hashes, strict=True)]
    key = digest([pydocs.FORMAT, platform.python_version(), modules])
    folder = build_once(
        cache / "documents" / key, lambda partial: pydocs.write_documents(sources, partial, num_workers)
    )
    return key, find_files(folder)
