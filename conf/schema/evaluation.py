"""One evaluation of a finished model."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schema.checks import check, check_choice
from conf.schema.data import DataConfig

SERIES = tuple(f"sparsellm-1b-{percent}p{twin}" for twin in ("", "-small-dense") for percent in (20, 40, 60, 80))
"""The published checkpoints."""


@dataclass
class EvalConfig:
    """One evaluation of a finished model."""

    folder: str = MISSING
    """A transformers folder or a hub name; `python -m eval` takes it as model=DIR."""
    data: DataConfig = MISSING
    tokenizer: str | None = None
    """A folder, a SentencePiece .model file or a hub name; null takes the model's own."""
    window: int | None = None
    """Tokens scored at a time. Where it is null the model's context, for `data=wikitext` at most 2048 of it; a model that
    names no context, as Mamba, needs it."""
    stride: int | None = None
    """Tokens between the starts of `data=wikitext`'s overlapping windows; null takes a quarter of the window."""
    batch_size: int | None = None
    """Windows at a time on each process; null takes 8, or fewer if their logits would fill more than 256 MiB."""
    dtype: str = "auto"
    """Compute type; `auto` takes the type in which the weights are stored."""
    device: str = "auto"
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, which `pip install .[eval]` brings, to run in the place of `data`."""
    task_path: str | None = None
    """A folder of yaml files with tasks of one's own."""
    series: str | None = None
    """A published checkpoint, such as sparsellm-1b-60p, to hold against its card; model=FOLDER is then a copy of it."""
    format: str = "text"

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check(self.batch_size is None or self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        check(self.window is None or self.window >= 2, f"window={self.window} must be at least 2 tokens.")
        check(
            self.data.sequence_length is None,
            f"data.sequence_length={self.data.sequence_length} is for training: give window={self.data.sequence_length}.",
        )
        check(self.stride is None or self.stride >= 1, f"stride={self.stride} must be at least 1 token.")
        check(
            self.stride is None or self.window is None or self.stride < self.window,
            f"stride={self.stride} must be below window={self.window}, or tokens between windows would not be scored.",
        )
        check(
            self.stride is None or (self.data.source == "wikitext" and not self.tasks),
            f"stride={self.stride} is for data=wikitext, whose windows overlap: remove it.",
        )
        check(
            self.task_path is None or bool(self.tasks),
            f"task_path={self.task_path} holds tasks: name those to run in tasks=[...].",
        )
        if self.series is not None:
            check_choice("series", self.series, SERIES)
            check(
                self.data.source == "wikitext" and not self.tasks,
                f"series={self.series} is held against the perplexity of its card: give data=wikitext and no tasks.",
            )
        check(
            self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:"),
            f"device={self.device} is not known: choose auto, cpu, cuda or cuda:N.",
        )
