"""torch.compile's modes on a GPU, with the bf16 and TF32 that runs use there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.process import in_own_process

STEPS = 4


def train_compiled(folder: Path, mode: str) -> dict[str, Any]:
    """Return the losses of a few steps, compiled in `mode` (eager on a CPU), with pruning before the third."""
    from sparsity import Geometric, SparsityCallback
    from tests.small_trainer import small_trainer
    from train.arguments import name_matmul_precision
    from train.distributed import join_world

    world = join_world(60)
    on_gpu = world.device.type == "cuda"
    options = {"torch_compile": True, "torch_compile_mode": mode, "tf32": True} if on_gpu else {}
    sparsity = SparsityCallback(Geometric(0.5, 2, 2, 1), report=False)
    trainer = small_trainer(folder, world=world, bf16=True, max_steps=STEPS, sparsity=sparsity, **options)
    name_matmul_precision()
    trainer.train()
    return {
        "losses": trainer.step_losses().tolist(),
        "density": sum(sparsity.kept.values()) / sparsity.num_prunable,
        "precision": torch.get_float32_matmul_precision() if on_gpu else "high",
    }


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "max-autotune"])
def test_a_run_tunes_its_kernels_under_bf16_and_tf32(tmp_path, mode):
    found = in_own_process(train_compiled, tmp_path, mode)
    assert found["precision"] == "high"
    assert found["density"] == 0.5
    # The loss stays at the logarithm of the vocabulary, because random rows teach nothing.
    assert found["losses"][0] == pytest.approx(4.85, abs=0.1)
    assert found["losses"][-1] == pytest.approx(4.85, abs=0.3)
