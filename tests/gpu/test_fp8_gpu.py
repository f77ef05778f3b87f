"""Float8 on the device: it learns what bf16 learns, compiled and under FSDP2, and pruned weights stay exactly 0.

A rehearsal on a CPU computes by emulation and does not compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.process import in_own_process

STEPS, SPARSITY = 20, 0.5
SHAPE = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip


def twenty_steps(folder: Path, fp8: bool) -> dict[str, Any]:
    """Train on the same four rows in every step, with pruning before the sixth."""
    from sparsity import OneShot, SparsityCallback, prunable_parameters
    from tests.small_trainer import random_rows, small_llama, small_trainer
    from train.distributed import join_world
    from train.model.export import full_tensor
    from train.speed.fp8 import convert_to_fp8

    world, model = join_world(60), small_llama(**SHAPE)
    replaced = convert_to_fp8(model, emulate=not torch.cuda.is_available()) if fp8 else []
    trainer = small_trainer(
        folder, world=world, model=model, rows=random_rows(4, SHAPE["max_position_embeddings"], SHAPE["vocab_size"]) * 16,
        max_steps=STEPS, bf16=True, torch_compile=torch.cuda.is_available(), logging_steps=STEPS,
        sparsity=SparsityCallback(OneShot(SPARSITY, 5), report=False),
    )  # fmt: skip
    trainer.train()
    weights = [full_tensor(param.detach()) for param in prunable_parameters(trainer._module).values()]
    return {
        "losses": trainer.step_losses().tolist(),
        "replaced": replaced,
        "zeros": sum(int((weight == 0).sum()) for weight in weights),
        "numel": sum(weight.numel() for weight in weights),
        "dtypes": {str(weight.dtype) for weight in weights},
        "is_finite": all(bool(weight.isfinite().all()) for weight in weights),
    }


def both_ways(folder: Path) -> list[dict[str, Any]]:
    return [twenty_steps(folder / str(fp8), fp8) for fp8 in (False, True)]


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_float8_learns_what_bf16_learns_and_pruned_weights_stay_zero(tmp_path):
    pytest.importorskip("torchao.float8", reason="torchao is not installed: pip install 'sparsellm[fp8]'")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"{torch.cuda.get_device_name()} has no float8 units: compute capability 8.9 or higher has")
    plain, float8 = in_own_process(both_ways, tmp_path)
    assert len(float8["replaced"]) == 14
    for found in (plain, float8):
        assert found["is_finite"]
        assert found["dtypes"] == {"torch.float32"}
        assert found["zeros"] == round(SPARSITY * found["numel"])
        assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert float8["losses"][0] == pytest.approx(plain["losses"][0], abs=0.02)
    assert float8["losses"][-1] == pytest.approx(plain["losses"][-1], abs=0.3)
