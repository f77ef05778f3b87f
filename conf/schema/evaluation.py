"""The keys of `python -m eval`, which evaluates a finished model."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schema.checks import check, check_choice
from conf.schema.data import DataConfig

SERIES = tuple(f"sparsellm-1b-{percent}p{twin}" for twin in ("", "-small-dense") for percent in (20, 40, 60, 80))
"""The names of the published checkpoints."""


@dataclass
class EvalConfig:
    """The keys of `python -m eval`."""

    folder: str = MISSING
    """A transformers folder or a hub name; `python -m eval` takes it as model=DIR."""
    data: DataConfig = MISSING
    """The text to score."""
    tokenizer: str | None = None
    """A folder, a SentencePiece .model file or a hub name; null takes the model's own."""
    window: int | None = None
    """Number of tokens that are read together. Null takes the model's context, but at most 2048 for `data=wikitext`; a model
    whose config names no context, such as Mamba, needs a value."""
    stride: int | None = None
    """Number of tokens between the starts of overlapping windows, for `data=wikitext`; null takes a quarter of the window."""
    batch_size: int | None = None
    """Number of windows at a time in each process; null takes 8, or fewer if their logits would need more than 256 MiB."""
    dtype: str = "auto"
    """Type to compute in; `auto` takes the type in which the weights are stored."""
    device: str = "auto"
    """Device of a single process: auto, cpu, cuda or cuda:N."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness to run instead of `data`; `pip install .[eval]` installs the harness."""
    task_path: str | None = None
    """A folder of yaml files with your own tasks."""
    series: str | None = None
    """A published checkpoint, such as sparsellm-1b-60p, to compare with its card; model=FOLDER may name a local copy."""
    format: str = "text"
    """`text`, or `json` for scripts."""

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
                f"series={self.series} is compared with the perplexity of its card: give data=wikitext and no tasks.",
            )
        check(
            self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:"),
            f"device={self.device} is not known: choose auto, cpu, cuda or cuda:N.",
        )
