"""Documents that could not be read and were left out."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_PLACES = 5
"""The number of skipped documents of each part whose errors are kept."""


@dataclass
class Skipped:
    """Documents that could not be read and were skipped."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """The errors of the first few, each with its place."""

    def add(self, words: str) -> None:
        """Count a document; keep the words about it if it is one of the first."""
        self.count += 1
        if len(self.first) < MOST_PLACES:
            self.first.append(words)


def leave_out(words: str, skipped: Skipped | None) -> None:
    """Raise, or record a document that is skipped."""
    if skipped is None:
        raise ValueError(words) from None
    skipped.add(words)
