"""The commands of `sparsellm`, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A module that runs as a command, and its line in the help."""

    module: str
    summary: str
    config: str
    """The yaml at the top of conf/ whose keys the command takes; completion reads it."""


COMMANDS = {
    "launch": Command("launch", "Start a run on this machine's devices; with -m a sweep", "train"),
    "plan": Command("launch.plan", "Print what a run will cost before it runs", "plan"),
    "train": Command("train", "Be one process of a run; accelerate launch starts several", "train"),
    "data": Command("train.data", "Turn text into tokens before any GPU is taken", "train"),
    "eval": Command("eval", "Score a finished model on text", "eval"),
    "compact": Command("eval.compact", "Write a sparse model's folder in fewer bytes", "compact"),
    "compare": Command("eval.pairs", "Compare sparse runs with their dense twins", "pairs"),
    "law": Command("eval.scaling_law", "Fit the scaling law of finished runs", "scaling_law"),
    "report": Command("eval.report", "Show runs side by side on one HTML page", "report"),
    "dashboard": Command("launch.dashboard", "Show runs side by side in wandb", "dashboard"),
}
