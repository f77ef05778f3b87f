"""Evaluation during a run: on its own held-out documents, on named held-out sets, and on lm-evaluation-harness tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from conf.schema import Config
from train.data.prepared import PreparedData
from train.data.sets import check_sets
from train.data.stream import heldout_tokens
from train.distributed import World
from train.harness import check_tasks, run_tasks
from train.scoring import Score, heldout_documents, reshard, score_stream


@dataclass
class Evaluation:
    """The evaluation of the run's model; the Trainer calls it at its evaluation steps, and the run at the end."""

    config: Config
    data: PreparedData
    sets: dict[str, PreparedData]
    tokenizer: Any
    world: World
    last: tuple[Score, dict[str, float]] | None = None
    """The latest result: the score of the run's own held-out documents, and the figures of the sets and tasks."""

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return loss, perplexity and bits per byte, and NAME/loss, TASK/METRIC, ... of the sets and tasks.

        Collective: every rank calls it.
        """
        self.last = self._scored(model, self.data), self.others(model)
        return {**heldout_figures(self.last[0], self.data), **self.last[1]}

    def final(self, model: nn.Module) -> tuple[Score, dict[str, float]]:
        """Return the finished model's score and the figures of the sets and tasks.

        If there are sets or tasks, the result of the last call is returned, which was made at the end of training.

        Collective: every rank calls it.
        """
        if self.config.eval.is_empty or self.last is None:
            return self._scored(model, self.data), {}
        return self.last

    def others(self, model: nn.Module) -> dict[str, float]:
        """Return the figures of the sets and tasks.

        Collective: every rank calls it.
        """
        found: dict[str, float] = {}
        for name, data in self.sets.items():
            figures = heldout_figures(self._scored(model, data), data)
            found |= {f"{name}/{figure}": value for figure, value in figures.items()}
        asked = self.config.eval
        if asked.tasks:
            was_training = model.training
            model.eval()
            results = run_tasks(
                asked.tasks,
                asked.task_path,
                getattr(model, "module", model),
                self.tokenizer,
                context=self.data.sequence_length,
                batch_size=self.config.trainer.per_device_eval_batch_size,
                world=self.world,
                limit=asked.limit,
                prefix="eval.",
            )
            model.train(was_training)
            reshard(model)
            found |= {f"{task}/{metric}": value for task, values in results.items() for metric, value in values.items()}
        return found

    def _scored(self, model: nn.Module, data: PreparedData) -> Score:
        return score_stream(
            model,
            heldout_tokens(data),
            documents=heldout_documents(data),
            window=data.sequence_length,
            batch_size=self.config.trainer.per_device_eval_batch_size,
            world=self.world,
            show_progress=not self.config.trainer.disable_tqdm,
        )


def heldout_figures(score: Score, data: PreparedData) -> dict[str, float]:
    """Return a score's loss, perplexity and bits per byte by name."""
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(data.heldout.num_bytes),
    }


def check_evaluation(config: Config, is_new: bool = True) -> None:
    """Check that the held-out sets and tasks exist, before the run's text is prepared.

    One process calls it.

    Args:
        config: The run's configuration.
        is_new: Whether the run begins. One that is resumed keeps the sets with which it began.

    Raises:
        ValueError: A set cannot be found or is trained on, or a task is unknown.
    """
    if is_new:
        check_sets(config)
    if config.eval.tasks:
        check_tasks(config.eval.tasks, config.eval.task_path, prefix="eval.")
