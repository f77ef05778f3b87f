"""Tasks of lm-evaluation-harness, as `python -m eval` runs them."""

from __future__ import annotations

from typing import Any

from conf.schema import EvalConfig
from train import harness


def check_tasks(config: EvalConfig) -> None:
    """Raise a ValueError if the harness is not installed or knows no such task."""
    harness.check_tasks(config.tasks, config.task_path)


def run_tasks(config: EvalConfig, model: Any, tokenizer: Any, context: int, batch_size: int) -> dict[str, Any]:
    """Return {"tasks": {task: {metric: value}}, "window": context}. Collective: over all ranks; each runs every request."""
    found = harness.run_tasks(config.tasks, config.task_path, model, tokenizer, context=context, batch_size=batch_size)
    return {"tasks": found, "window": context}
