"""The keys of `python -m eval.scaling_law`, which fits the scaling law to finished runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.schema.checks import check, check_choice, names_of


@dataclass
class PredictConfig:
    """A run whose loss the fitted law predicts: its size and tokens, or the experiment that plans it."""

    avg_linear_params: float | None = None
    """Average number of linear parameters of the run, N-bar."""
    total_tokens: float | None = None
    """Number of tokens of the run."""
    experiment: str | None = None
    """An experiment, from which a plan computes both numbers."""
    overrides: list[str] = field(default_factory=list)
    """Changes to the experiment: predict.overrides=[sparsity.target=0.6]."""

    def __post_init__(self) -> None:
        for key in ("avg_linear_params", "total_tokens"):
            value = getattr(self, key)
            check(value is None or value > 0, f"predict.{key}={value} must be above 0.")
        numbers = (self.avg_linear_params is not None, self.total_tokens is not None)
        check(
            self.experiment is None or not any(numbers),
            f"predict.experiment={self.experiment} already says size and tokens: leave out predict.avg_linear_params and "
            "predict.total_tokens.",
        )
        check(
            self.experiment is not None or all(numbers) or not any(numbers),
            "a prediction needs both predict.avg_linear_params and predict.total_tokens, or predict.experiment.",
        )
        check(
            self.experiment is not None or not self.overrides,
            f"predict.overrides={self.overrides} changes an experiment: name it with predict.experiment.",
        )

    @property
    def is_asked(self) -> bool:
        """True if the command asks for a prediction."""
        return self.experiment is not None or self.avg_linear_params is not None


@dataclass
class ScalingLawConfig:
    """The keys of `python -m eval.scaling_law`: the runs, the form of the law, and what to compute from it."""

    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, patterns of them, or CSV files: one or a list."""
    form: str = "nd"
    """nd: E + A / N^alpha + B / D^beta. For runs with equal numbers of tokens, n: E + A / N^alpha, or power: A / N^alpha."""
    loss: str = "auto"
    """The figure to fit; `auto` takes the first of loss, heldout_loss, final_train_loss that every run has."""
    num_bootstrap: int = 400
    """Number of resamples of the runs, from which intervals are computed."""
    confidence: float = 0.95
    """Confidence of the intervals."""
    num_folds: int | None = None
    """Number of folds for the held-out error; null leaves each configuration out once."""
    seed: int = 0
    """Seed of the resamples and of random folds."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    """A run whose loss to predict; nothing is predicted if it is left out."""
    target_loss: float | None = None
    """A loss for which to compute the cheapest N and D."""
    format: str = "text"
    """`text`, or `json` for scripts."""
    figure: str | None = "scaling_law.png"
    """File for the figure; null draws none."""

    def __post_init__(self) -> None:
        self.runs = names_of(self.runs)
        check_choice("form", self.form, ("nd", "n", "power"))
        check_choice("format", self.format, ("text", "json"))
        check(self.num_bootstrap >= 20, f"num_bootstrap={self.num_bootstrap} must be at least 20 resamples.")
        check(
            0 < self.confidence < 1,
            f"confidence={self.confidence} is outside (0, 1): give 0.95 for intervals of 95 %.",
        )
        check(self.num_folds is None or self.num_folds >= 2, f"num_folds={self.num_folds} must be at least 2, or null.")
        check(
            self.target_loss is None or self.target_loss > 0,
            f"target_loss={self.target_loss} must be above 0 nats per token.",
        )
