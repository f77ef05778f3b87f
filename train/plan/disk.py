"""The bytes that a run writes, so that a lack of disk space is found before the training instead of at its end."""

from __future__ import annotations

from pathlib import Path

from conf.schema import Config, ModelConfig
from train.plan.counts import count_parameters
from train.plan.memory import FLOAT32_BYTES, muon_weights
from train.plan.run import RunPlan

ROOM_FOR_SMALL_FILES = 16 << 20


def checkpoint_bytes(
    model: ModelConfig, num_prunable: int, update_state_bytes: int = 0, uses_muon: bool = False
) -> int:
    """Return the bytes of a checkpoint, over all ranks.

    Args:
        model: The model; its weights and both moments are saved in float32.
        num_prunable: The number of prunable weights, each of which has a bit in a mask.
        update_state_bytes: The bytes per prunable weight of the state that updates of the masks keep.
        uses_muon: Whether Muon updates the matrices of the blocks, with one moment instead of two.
    """
    fewer = FLOAT32_BYTES * muon_weights(model) if uses_muon else 0
    return 12 * count_parameters(model).total - fewer + num_prunable // 8 + update_state_bytes * num_prunable


def export_bytes(model: ModelConfig, dtype: str) -> int:
    """Return the bytes of the exported model's weights."""
    return (2 if dtype == "bfloat16" else 4) * count_parameters(model).total


def run_bytes(config: Config, plan: RunPlan) -> int:
    """Return the bytes of the final model and of all checkpoints on disk at once: those kept and the one being written."""
    kept = 0 if config.trainer.save_strategy == "no" else config.trainer.save_total_limit + 1
    kept += len(config.trainer.keep_steps)
    checkpoints = kept * checkpoint_bytes(
        plan.model, plan.counts.linear if plan.schedule else 0, plan.update.state_bytes, config.trainer.optim == "muon"
    )
    return checkpoints + export_bytes(plan.model, config.export.dtype) + ROOM_FOR_SMALL_FILES


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below `folder`; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
