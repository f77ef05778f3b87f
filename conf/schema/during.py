"""The group `eval`: evaluations of a run in addition to its own held-out documents."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.checks import check
from conf.schema.data import SourceConfig


@dataclass
class DuringConfig:
    """Held-out sets and tasks of lm-evaluation-harness, evaluated during the run and at its end."""

    every: int | None = None
    """Steps between two evaluations; null evaluates only at the end, or as trainer.eval_strategy says."""
    sets: list[SourceConfig] = field(default_factory=list)
    """Texts that are only scored: [{path or hub, subset, split, field, name}, ...], recorded as eval/NAME/loss."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, recorded as eval/TASK/METRIC; `pip install .[eval]` installs the harness."""
    task_path: str | None = None
    """A folder of yaml files with your own tasks."""
    limit: int = 100
    """Number of examples of each task."""

    def __post_init__(self) -> None:
        check(self.every is None or self.every >= 1, f"eval.every={self.every} must be at least 1 step.")
        check(self.limit >= 1, f"eval.limit={self.limit} must be at least 1 example of each task.")
        names = [*(source.stem for source in self.sets), *self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        check(twice is None, f"eval.sets and eval.tasks have two called {twice}: give one of them another name.")
        check(
            self.task_path is None or bool(self.tasks),
            f"eval.task_path={self.task_path} holds tasks: name those to run in eval.tasks=[...].",
        )

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to evaluate except the run's own held-out documents."""
        return not self.sets and not self.tasks
