"""A step's sequences, divided among processes and micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

from conf.schema import Config


def world_size_asked(config: Config, environment: Mapping[str, str]) -> int:
    """Return the number of processes that the launcher started.

    Raises:
        ValueError: The config asks for another number.
    """
    local, asked = int(environment.get("LOCAL_WORLD_SIZE", "1")), config.launch.num_processes
    if asked is not None and asked != local:
        raise ValueError(
            f"launch.num_processes={asked}, but {local} {'was' if local == 1 else 'were'} started on this machine: start the "
            f"run with `python -m launch`, or give accelerate --num_processes {asked} and a config of launch/accelerate."
        )
    return int(environment.get("WORLD_SIZE", "1"))


def split_batch(config: Config, world_size: int) -> tuple[int, int, int]:
    """Return (sequences per step, sequences per micro-batch and process, micro-batches per step)."""
    trainer = config.trainer
    micro, accumulation = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    if config.batch_size is None:
        accumulation = accumulation or 1
        return world_size * micro * accumulation, micro, accumulation
    if config.batch_size % world_size:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided among {world_size} processes: use a multiple of "
            f"{world_size}, or another number of processes."
        )
    share = config.batch_size // world_size
    if accumulation is None:
        micro = next(size for size in range(min(micro, share), 0, -1) if share % size == 0)
        return config.batch_size, micro, share // micro
    if micro * accumulation != share:
        raise ValueError(
            f"batch_size={config.batch_size} is not {world_size} processes x trainer.per_device_train_batch_size={micro} "
            f"x trainer.gradient_accumulation_steps={accumulation}: set trainer.gradient_accumulation_steps=null to "
            "derive it, or batch_size=null."
        )
    return config.batch_size, micro, accumulation
