"""The panels that compare runs: one list for both the page and the wandb dashboards.

Their keys are those of metrics.jsonl, which are also sent to wandb; for `points` and `bars` they are those of summary.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["lines", "stairs", "layers", "points", "bars"]
"""Curves of records, straight or as a staircase; a figure of all layers; one mark or one bar for each run."""


@dataclass(frozen=True)
class Panel:
    """One figure of several runs. `name` is its anchor and file name; a `y` that ends in /* means every key of a group."""

    name: str
    section: str
    title: str
    kind: Kind
    y: str
    y_label: str
    x: str = "train/tokens"
    x_label: str = "tokens"
    log_x: bool = False
    log_y: bool = False
    dense_y: float | None = None
    """The value drawn for a dense run, which does not record `y`."""
    note: str = ""

    @property
    def of_records(self) -> bool:
        """True if the keys are those of metrics.jsonl; otherwise they are those of summary.json."""
        return self.kind in ("lines", "stairs", "layers")


PANELS = (
    Panel(
        "loss", "Loss", "Training loss against tokens", "lines",
        y="train/loss", y_label="loss (nats per token)",
    ),
    Panel(
        "loss_avg_params", "Loss", "Final loss against average linear parameters", "points",
        y="heldout_loss", y_label="held-out loss (nats per token)",
        x="avg_linear_params", x_label="average linear parameters, N-bar", log_x=True,
        note="The paper's claim: a sparse run (filled) is where a dense one (hollow) of as many parameters is.",
    ),
    Panel(
        "heldout_loss", "Loss", "Held-out loss against tokens", "lines",
        y="eval/loss", y_label="loss (nats per token)",
        note="Recorded with trainer.eval_strategy=steps trainer.eval_steps=N.",
    ),
    Panel(
        "bits_per_byte", "Loss", "Held-out bits per byte", "bars",
        y="bits_per_byte", y_label="bits per byte", x="run_name",
    ),
    Panel(
        "density", "Sparsity", "Density", "stairs",
        y="sparsity/density", y_label="share of linear weights kept", dense_y=1.0,
    ),
    Panel(
        "average_density", "Sparsity", "Average density so far", "lines",
        y="sparsity/average_density", y_label="mean density over the steps", dense_y=1.0,
        note="Multiplied by the number of linear parameters, it is N-bar.",
    ),
    Panel(
        "threshold", "Sparsity", "Pruning threshold", "stairs",
        y="sparsity/threshold", y_label="largest magnitude pruned",
    ),
    Panel(
        "layer_density", "Sparsity", "Density of each layer", "layers",
        y="layer_density/*", y_label="share of the layer's weights kept",
    ),
    Panel(
        "throughput", "Training", "Throughput", "lines",
        y="train/tokens_per_second", y_label="tokens per second",
    ),
    Panel(
        "mfu", "Training", "Share of the GPUs' peak FLOP/s", "lines",
        y="perf/mfu", y_label="MFU",
        note="Of training steps: without prune events, evaluation and saving. Recorded on GPUs whose peak is known.",
    ),
    Panel(
        "learning_rate", "Training", "Learning rate", "lines",
        y="train/learning_rate", y_label="learning rate",
    ),
    Panel(
        "grad_norm", "Training", "Gradient norm", "lines",
        y="train/grad_norm", y_label="global norm before clipping", log_y=True,
    ),
)  # fmt: skip

SECTIONS = tuple(dict.fromkeys(panel.section for panel in PANELS))

TABLE = {
    "total_params": "total_params",
    "linear_params": "linear_params",
    "avg_linear_params": "avg_linear_params",
    "nonzero_linear": "nonzero_linear_params",
    "sparsity": "sparsity",
    "batch_tokens": "batch_tokens",
    "lr": "learning_rate",
    "total_tokens": "total_tokens",
    "final_train_loss": "final_train_loss",
    "perplexity": "perplexity",
}
"""The columns of the published series' table after the run's name, and the figure of summary.json that each shows."""
