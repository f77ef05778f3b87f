"""The sources of a data configuration: a single one, or those of a mixture with their names and weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conf.schema import DataConfig
from conf.schema.data import SourceConfig
from train.data import dataset, fineweb
from train.data.foreign import find_token_files, holds_tokens
from train.data.parts import find_files, kind_of, walk


@dataclass(frozen=True)
class Source:
    """One source, configured as if it were the only one."""

    name: str
    weight: float
    config: DataConfig


def sources_of(data: DataConfig) -> list[Source]:
    """Return a mixture's sources, or a list of the one configured source."""
    if data.source != "mixture":
        return [Source(data.source, 1.0, data)]
    return [Source(one.stem, one.weight, config_of(one, data)) for one in data.sources]


def config_of(source: SourceConfig, data: DataConfig) -> DataConfig:
    """Return the configuration of a run on only this source; keys that a source does not have come from `data`."""
    is_tokens = source.path is not None and holds_tokens(source.path)
    if is_tokens and source.path is not None:
        _check_only_tokens(Path(source.path).expanduser())
    return replace(
        data,
        source="hub" if source.hub is not None else "tokens" if is_tokens else "text",
        path=source.path,
        name=source.hub,
        subset=source.subset,
        split=source.split,
        stream=data.stream and source.hub is not None,
        text_field=source.field or data.text_field,
        max_documents=source.max_documents,
        max_document_tokens=None if is_tokens else data.max_document_tokens,
        token_dtype=data.token_dtype if is_tokens else None,
        sources=[],
    )


def _check_only_tokens(path: Path) -> None:
    """Raise if a folder holds text beside its tokens, which would not be read."""
    text = next((file for file in walk(path) if kind_of(file) is not None), None) if path.is_dir() else None
    if text is not None:
        tokens = find_token_files(path)[0]
        raise ValueError(
            f"{path} holds tokens ({tokens.relative_to(path)}) and text ({text.relative_to(path)}): give them as two "
            "sources, each with a folder of its own."
        )


def check_sources(sources: Sequence[Source]) -> None:
    """Check that all sources exist before any of them is read.

    Raises:
        ValueError: A file or folder does not exist.
    """
    for source in sources:
        path = source.config.path
        if path is not None and not Path(path).expanduser().exists():
            places_of(source.config)


def tell_uncut(data: DataConfig) -> None:
    """Say on stderr which sources of a mixture data.max_document_tokens does not cut, because they hold tokens."""
    if data.max_document_tokens is None:
        return
    for source in sources_of(data):
        if source.config.source == "tokens":
            print(
                f"data.max_document_tokens={data.max_document_tokens} does not cut the documents of {source.name}: tokens are "
                "read as they are.",
                file=sys.stderr,
                flush=True,
            )


def places_of(config: DataConfig) -> set[str]:
    """Return the files that a source reads, as real paths, or the name of its dataset on the hub; nothing is read.

    Raises:
        ValueError: There is nothing to read, or a dataset has no such subset or split.
    """
    files: Sequence[str | Path] = ()
    if config.source == "tokens":
        assert config.path is not None
        files = find_token_files(config.path)
    elif config.source == "text":
        assert config.path is not None
        files = find_files(config.path)
    elif config.source == "fineweb_edu":
        if config.path is None:
            return {f"{fineweb.REPOSITORY} {config.subset} train"}
        files = fineweb.local_files(config.path, config.subset)
    elif config.source == "hub":
        assert config.name is not None
        asked = dataset.Asked(config.name, config.subset, config.split)
        files = dataset.listed_files(asked)
        if asked.folder is None:
            return {f"{config.name} {config.subset} {config.split}"}
    return {str(Path(file).resolve()) for file in files}
