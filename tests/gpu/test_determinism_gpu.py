"""In deterministic mode a GPU computes the same bits again, also after a resume."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.process import in_own_process

SHAPE = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 1024,
}  # fmt: skip
"""Rows so long that many thread blocks of an attention kernel add to the same gradient."""
ON_CPU = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


def six_steps(folder: Path, resume_from: Path | None) -> dict[str, Any]:
    """Train for six bf16 steps in deterministic mode, pruning before steps 1 and 4 and saving after step 3."""
    from train.determinism import compute_deterministically

    compute_deterministically()

    import torch

    from sparsity import Geometric, SparsityCallback
    from tests.small_trainer import random_rows, small_llama, small_trainer
    from train.checkpoints.contents import parameters_of
    from train.distributed import join_world
    from train.trainer import PretrainingTrainer

    dtypes, shape = [], SHAPE if torch.cuda.is_available() else ON_CPU

    class Watched(PretrainingTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            dtypes.append(str(loss.dtype))
            return loss

    rows = random_rows(64, shape["max_position_embeddings"], shape["vocab_size"])
    trainer = small_trainer(
        folder, world=join_world(60), model=small_llama(**shape), rows=rows, kind=Watched, bf16=True, max_steps=6,
        save_strategy="steps", save_steps=3, save_total_limit=2, per_device_train_batch_size=4,
        sparsity=SparsityCallback(Geometric(0.5, 1, 4, 3)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    digest = hashlib.sha256()
    for param in parameters_of(trainer._module).values():
        whole = param.full_tensor() if hasattr(param, "full_tensor") else param
        digest.update(whole.detach().cpu().numpy().tobytes())
    first = torch.stack([row["input_ids"] for row in rows])
    return {
        "losses": trainer.step_losses().tolist(),
        "digest": digest.hexdigest(),
        "dtypes": set(dtypes),
        # The loss hardly depends on which of the random rows a step takes.
        "cpu_loss": float(small_llama(**shape)(input_ids=first[:2], labels=first[:2]).loss.detach()),
        "is_blocking": os.environ.get("CUDA_LAUNCH_BLOCKING", "0"),
    }


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_bf16_steps_and_a_resume_give_the_same_bits_in_deterministic_mode(tmp_path):
    one = in_own_process(six_steps, tmp_path / "one", None)
    again = in_own_process(six_steps, tmp_path / "again", None)
    resumed = in_own_process(six_steps, tmp_path / "resumed", tmp_path / "one" / "checkpoint-3")
    assert one["digest"] == again["digest"] == resumed["digest"]
    assert one["losses"] == again["losses"] == resumed["losses"]
    assert one["dtypes"] == {"torch.float32"}
    assert one["losses"][0] == pytest.approx(one["cpu_loss"], abs=0.05)
    assert one["is_blocking"] == "0"
