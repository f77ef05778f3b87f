"""Ways to prune side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.schema.checks import check_choice, names_of


@dataclass
class MethodsConfig:
    """Keys of `python -m eval.methods`."""

    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, or patterns of them: one, or a list."""
    format: str = "text"
    """`text`, or `json` for scripts."""
    figure: str | None = "methods.png"
    """File for the figure; null draws none."""

    def __post_init__(self) -> None:
        self.runs = names_of(self.runs)
        check_choice("format", self.format, ("text", "json"))
