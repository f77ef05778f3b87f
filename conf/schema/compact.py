"""A finished model's folder made compact, or plain again."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from conf.schema.checks import check, check_choice


@dataclass
class CompactConfig:
    """Keys of `python -m eval.compact`."""

    folder: str = MISSING
    """A transformers folder; `python -m eval.compact` takes it as model=DIR."""
    out: str = MISSING
    """The folder to write, which must not exist."""
    expand: bool = False
    """Make a compact folder plain again."""
    dtype: str | None = None
    """Round the weights to this type first; null keeps every bit."""
    format: str = "text"

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check(
            not (self.expand and self.dtype),
            f"dtype={self.dtype} has no meaning with expand=true, which gives every tensor the bits that it had: leave it "
            "out.",
        )
