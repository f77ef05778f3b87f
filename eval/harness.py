"""Tasks of lm-evaluation-harness on a model that is loaded already."""

from __future__ import annotations

from typing import Any

from conf.schema import EvalConfig


def check_tasks(config: EvalConfig) -> None:
    """A ValueError where the harness is not installed or knows no such task."""
    known = set(_manager(config).all_tasks)
    if unknown := [name for name in config.tasks if name not in known]:
        raise ValueError(
            f"tasks={unknown} are not known to lm-evaluation-harness: `lm-eval ls tasks` lists its own, and task_path names a "
            "folder with yours."
        )


def run_tasks(config: EvalConfig, model: Any, tokenizer: Any, context: int, batch_size: int) -> dict[str, Any]:
    """{"tasks": {task: {metric: value}}}. Every rank runs all of it in step, as FSDP needs. Collective."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=context, batch_size=batch_size)
        found = simple_evaluate(
            harness, tasks=list(config.tasks), task_manager=_manager(config), log_samples=False, bootstrap_iters=0
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"tasks={config.tasks} could not be run ({reason}): fetch their data while the hub can be reached, or give "
            "tasks on local files in task_path."
        ) from None
    return {"tasks": {name: _plain(values) for name, values in found["results"].items()}, "window": context}


def _manager(config: EvalConfig) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            f"tasks={config.tasks} need lm-evaluation-harness, which is not installed: pip install '.[eval]'."
        ) from None
    try:
        return TaskManager(include_path=config.task_path)
    except Exception as error:
        raise ValueError(
            f"task_path={config.task_path} cannot be read ({error}): give a folder of task yamls."
        ) from None


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """{metric: value}: the harness writes metric,filter."""
    return {key.removesuffix(",none"): float(value) for key, value in values.items() if isinstance(value, int | float)}
