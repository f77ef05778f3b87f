"""One evaluation of a finished model."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from conf.schema.checks import check, check_choice
from conf.schema.data import DataConfig


@dataclass
class EvalConfig:
    """One evaluation of a finished model."""

    folder: str = MISSING
    """A transformers folder; `python -m eval` takes it as model=DIR."""
    data: DataConfig = MISSING
    tokenizer: str | None = None
    """The model's own where it is null."""
    window: int | None = None
    """Tokens scored at a time; the model's context where it is null."""
    batch_size: int = 8
    device: str = "auto"
    format: str = "text"

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        check(self.window is None or self.window >= 2, f"window={self.window} must be at least 2 tokens.")
        check(
            self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:"),
            f"device={self.device} is not known: choose auto, cpu, cuda or cuda:N.",
        )
