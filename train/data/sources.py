"""The sources of a data configuration: a single one, or those of a mixture with their names and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema import DataConfig
from conf.schema.data import SourceConfig
from train.data.foreign import holds_tokens


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
    return replace(
        data,
        source="hub" if source.hub is not None else "tokens" if is_tokens else "text",
        path=source.path,
        name=source.hub,
        subset=source.subset,
        split=source.split,
        text_field=source.field,
        max_documents=source.max_documents,
        max_document_tokens=None if is_tokens else data.max_document_tokens,
        token_dtype=data.token_dtype if is_tokens else None,
        sources=[],
    )
