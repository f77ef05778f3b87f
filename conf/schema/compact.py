"""The keys of `python -m eval.compact`, which makes a model folder compact or plain again."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from conf.schema.checks import check, check_choice


@dataclass
class CompactConfig:
    """The keys of `python -m eval.compact`."""

    folder: str = MISSING
    """A transformers folder; `python -m eval.compact` takes it as model=DIR."""
    out: str = MISSING
    """The folder to write, which must not exist."""
    expand: bool = False
    """Make a compact folder plain again."""
    dtype: str | None = None
    """Round the weights to this type first; null keeps every bit."""
    values: str | None = None
    """Round the kept values of sparse tensors: int8 or int4; null keeps every bit of them."""
    group: int | None = None
    """Number of kept values that share a scale, a multiple of 16; 0 gives each row one. null: 0 for int8, 64 for int4."""
    scale: str = "mse"
    """Rule that chooses a scale: mse (the least squared error) or absmax (the largest magnitude gets the largest code)."""
    row_starts: bool = False
    """Also store the number of kept weights before each row, 8 bytes for each, for readers of single rows."""
    text: str | None = None
    """A text file; the perplexity on it before and after is added to the figures and the card."""
    format: str = "text"
    """`text`, or `json` for scripts."""

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check_choice("scale", self.scale, ("mse", "absmax"))
        if self.values is not None:
            check_choice("values", self.values, ("int8", "int4"))
        check(
            self.group is None or (self.values is not None and self.group >= 0 and self.group % 16 == 0),
            f"group={self.group} is not a multiple of 16 with values=int8 or int4: give 32 or 64, or 0 for one scale per "
            "row.",
        )
        if self.dtype is not None:
            check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check(
            not (self.expand and (self.dtype or self.values or self.row_starts or self.text)),
            "dtype, values, row_starts and text have no effect with expand=true, which only restores the stored values: "
            "leave them out.",
        )
