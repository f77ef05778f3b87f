"""The learning rate's warm-up and decay in steps, and the checks that they leave room for each other and for pruning."""

from __future__ import annotations

import math

from conf.schema.trainer import TrainerConfig
from sparsity.schedule import Ramp


def decay_length(decay_steps: float, num_steps: int) -> int:
    """Return the number of steps that optim.decay_steps stands for: a value below 1 is a share of the run."""
    return round(decay_steps * num_steps) if decay_steps < 1 else round(decay_steps)


def warmup_length(trainer: TrainerConfig, num_steps: int) -> int:
    """Return the number of steps that optim.warmup_steps stands for, as transformers computes it."""
    steps = trainer.warmup_steps
    return math.ceil(steps * num_steps) if steps < 1 else int(steps)


def decay_start(trainer: TrainerConfig, num_steps: int) -> int | None:
    """Return the step before which the decay of optim=wsd begins; None if the run has no such decay.

    Raises:
        ValueError: The decay is longer than the run.
    """
    decay = trainer.lr_scheduler_kwargs.get("num_decay_steps") if trainer.decay_steps is None else trainer.decay_steps
    length = decay_length(decay or 0, num_steps)
    if length > num_steps:
        raise ValueError(
            f"{decay_words(trainer)} is longer than the run of {num_steps} steps: give fewer steps, or a share below 1."
        )
    return num_steps - length if length else None


def decay_words(trainer: TrainerConfig) -> str:
    """Return the setting that gives the decay its length, with its value."""
    if trainer.decay_steps is None:
        return f"optim.lr_scheduler_kwargs.num_decay_steps={trainer.lr_scheduler_kwargs.get('num_decay_steps')}"
    return f"optim.decay_steps={trainer.decay_steps:g}"


def check_decay(trainer: TrainerConfig, num_steps: int) -> None:
    """Refuse a warm-up and a decay that overlap: the rate would never reach its peak."""
    begin, warmup = decay_start(trainer, num_steps), warmup_length(trainer, num_steps)
    if begin is not None and warmup > begin:
        raise ValueError(
            f"optim.warmup_steps={trainer.warmup_steps:g} ends at step {warmup}, after the decay of "
            f"{decay_words(trainer)} begins at step {begin} of {num_steps}: shorten one of them, or train longer."
        )


def check_window_and_decay(trainer: TrainerConfig, schedule: Ramp, num_steps: int) -> None:
    """Refuse to prune while the learning rate decays: the model would have no time to recover."""
    begin = decay_start(trainer, num_steps)
    if begin is not None and schedule.end_step > begin:
        raise ValueError(
            f"The prune window ends at step {schedule.end_step}, after the decay of {decay_words(trainer)} begins at "
            f"step {begin}: end the window earlier (sparsity.window.end), or decay later."
        )
