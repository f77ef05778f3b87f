"""Tasks of lm-evaluation-harness on a model in memory, on one rank or divided among all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import World


def check_tasks(tasks: Sequence[str], task_path: str | None, prefix: str = "") -> None:
    """Check that the harness is installed and has the tasks.

    Args:
        tasks: Names of tasks.
        task_path: A folder with the user's own task yamls, or None.
        prefix: The prefix of the user's keys in error messages.

    Raises:
        ValueError: The harness is not installed, or a task is unknown.
    """
    known = set(_manager(tuple(tasks), task_path, prefix).all_tasks)
    if unknown := [name for name in tasks if name not in known]:
        raise ValueError(
            f"{prefix}tasks={unknown} are not known to lm-evaluation-harness: `lm-eval ls tasks` lists its own, and "
            f"{prefix}task_path names a folder with yours."
        )


def run_tasks(
    tasks: Sequence[str],
    task_path: str | None,
    model: Any,
    tokenizer: Any,
    *,
    context: int,
    batch_size: int,
    world: World | None = None,
    limit: int | None = None,
    prefix: str = "",
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness and return {task: {metric: value}}.

    Without `world` every rank runs all examples, in step with the others, as FSDP needs. With `world` the ranks divide
    the examples among them, and all return the figures.

    Collective: every rank calls it.

    Args:
        tasks: Names of tasks.
        task_path: A folder with the user's own task yamls, or None.
        model: The model, already loaded.
        tokenizer: Its tokenizer.
        context: The longest input in tokens.
        batch_size: Inputs in one forward pass of a rank.
        world: The ranks that divide the examples.
        limit: The number of examples of each task; None for all.
        prefix: The prefix of the user's keys in error messages.

    Raises:
        ValueError: A task could not be run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(tuple(tasks), task_path, prefix)
    try:
        # The harness's cache of logits mixes up windows of a batch that read the same tokens (lm-eval 0.4.13).
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=context,
            batch_size=batch_size,
            logits_cache=False,
            # In bfloat16 a log-probability near 8 would have steps of 0.03.
            softmax_dtype="float32",
        )
        if world is not None and world.size > 1:
            harness._rank, harness._world_size = world.rank, world.size
            harness.accelerator = _Gather(world)
            # When they generate, ranks make different numbers of forward passes, and FSDP would wait forever.
            harness.generate_until = _refuse_to_generate
        found = simple_evaluate(
            harness,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
            # The random generators belong to the run, so the harness must not seed them.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{prefix}tasks={list(tasks)} could not be run ({reason}): fetch their data while the hub can be reached, or give "
            f"tasks on local files in {prefix}task_path."
        ) from None
    if world is not None:
        found = world.on_main(lambda: {"results": found["results"]})
    return {name: plain_metrics(values) for name, values in found["results"].items()}


def _refuse_to_generate(*_: Any, **__: Any) -> Any:
    raise ValueError("a task that generates text is for `python -m eval`, after the run")


class _Gather:
    """The few methods of accelerate's Accelerator that the harness calls, over the run's own process group."""

    def __init__(self, world: World) -> None:
        self.world = world

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, flattened, in rank order."""
        pieces = [torch.zeros_like(tensor.reshape(-1)) for _ in range(self.world.size)]
        dist.all_gather(pieces, tensor.reshape(-1))
        return torch.cat(pieces)

    def wait_for_everyone(self) -> None:
        dist.barrier()

    def unwrap_model(self, model: Any) -> Any:
        return model


@cache
def _manager(tasks: tuple[str, ...], folder: str | None, prefix: str) -> Any:
    """Return a task manager of only `folder` if that has all tasks, because reading the harness's own takes a minute."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            f"{prefix}tasks={list(tasks)} need lm-evaluation-harness, which is not installed: pip install '.[eval]'."
        ) from None
    if folder is None:
        return TaskManager()
    if not Path(folder).is_dir():
        raise ValueError(f"{prefix}task_path={folder} is no folder: give one with task yamls.")
    try:
        own = TaskManager(include_path=folder, include_defaults=False)
        return own if set(tasks) <= set(own.all_tasks) else TaskManager(include_path=folder)
    except Exception as error:
        raise ValueError(
            f"{prefix}task_path={folder} cannot be read ({error}): give a folder with task yamls."
        ) from None


def plain_metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return {metric: value} without the task's name, which the harness adds, and without the filter name "none"."""
    return {key.removesuffix(",none"): float(value) for key, value in values.items() if isinstance(value, int | float)}
