"""Tasks of lm-evaluation-harness on a model that is loaded already."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from conf.schema import EvalConfig


def check_tasks(config: EvalConfig) -> None:
    """A ValueError where the harness is not installed or knows no such task."""
    known = set(_manager(tuple(config.tasks), config.task_path).all_tasks)
    if unknown := [name for name in config.tasks if name not in known]:
        raise ValueError(
            f"tasks={unknown} are not known to lm-evaluation-harness: `lm-eval ls tasks` lists its own, and task_path names a "
            "folder with yours."
        )


def run_tasks(config: EvalConfig, model: Any, tokenizer: Any, context: int, batch_size: int) -> dict[str, Any]:
    """{"tasks": {task: {metric: value}}}. Every rank runs all of it in step, as FSDP needs. Collective."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(tuple(config.tasks), config.task_path)
    try:
        # Its cache of logits confuses windows of a batch that read the same tokens (lm-eval 0.4.13).
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=context,
            batch_size=batch_size,
            logits_cache=False,
            # In bfloat16 a log-probability near 8 would come in steps of 0.03.
            softmax_dtype="float32",
        )
        found = simple_evaluate(
            harness, tasks=list(config.tasks), task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"tasks={config.tasks} could not be run ({reason}): fetch their data while the hub can be reached, or give "
            "tasks on local files in task_path."
        ) from None
    return {"tasks": {name: _plain(values) for name, values in found["results"].items()}, "window": context}


@cache
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """The tasks there are: those of `folder` alone where it has all that are asked for, since the harness takes a minute
    to read its own."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            f"tasks={list(tasks)} need lm-evaluation-harness, which is not installed: pip install '.[eval]'."
        ) from None
    if folder is None:
        return TaskManager()
    if not Path(folder).is_dir():
        raise ValueError(f"task_path={folder} is no folder: give one with task yamls.")
    try:
        own = TaskManager(include_path=folder, include_defaults=False)
        return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=folder)
    except Exception as error:
        raise ValueError(f"task_path={folder} cannot be read ({error}): give a folder with task yamls.") from None


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """{metric: value}: the harness writes metric,filter."""
    return {key.removesuffix(",none"): float(value) for key, value in values.items() if isinstance(value, int | float)}
