"""How many bytes a run writes, so that a full disk is found before the training and not at its end."""

from __future__ import annotations

from pathlib import Path

from conf.schema import Config, ModelConfig
from train.plan.counts import count_parameters
from train.plan.run import RunPlan

ROOM_FOR_SMALL_FILES = 16 << 20


def checkpoint_bytes(model: ModelConfig, num_prunable: int) -> int:
    """Float32 weights and both moments, and a bit for each mask entry: all ranks together."""
    return 12 * count_parameters(model).total + num_prunable // 8


def export_bytes(model: ModelConfig, dtype: str) -> int:
    return (2 if dtype == "bfloat16" else 4) * count_parameters(model).total


def run_bytes(config: Config, plan: RunPlan) -> int:
    """The final model and the checkpoints that stand at a time: those kept and the one being written."""
    kept = 0 if config.trainer.save_strategy == "no" else config.trainer.save_total_limit + 1
    kept += len(config.trainer.keep_steps)
    checkpoints = kept * checkpoint_bytes(plan.model, plan.counts.linear if plan.schedule else 0)
    return checkpoints + export_bytes(plan.model, config.export.dtype) + ROOM_FOR_SMALL_FILES


def bytes_below(folder: Path) -> int:
    """What lies in `folder` now; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
