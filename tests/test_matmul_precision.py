"""After transformers has turned on TF32, inductor can still tune its matrix products."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import composed
from tests.distributed import run_ranks
from train.plan.run import plan_run


def precision_after_arguments(folder: Path, tf32: str) -> tuple[str, str]:
    """Make our arguments, and return torch's two settings of matmul precision; TF32 needs a GPU, so one is faked."""
    import torch
    from transformers import training_args

    from train.arguments import training_arguments
    from train.distributed import join_world

    join_world(60)
    training_args.is_torch_tf32_available = lambda: True
    config = composed(
        "train", ["experiment=demo", "trainer.torch_compile=true", "trainer.bf16=true", f"trainer.tf32={tf32}"]
    )
    training_arguments(config, plan_run(config, 1), folder)
    return torch.backends.fp32_precision, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    ("tf32", "expected"),
    # transformers turns on TF32 for compiled bf16 runs by itself.
    [("true", ("tf32", "high")), ("null", ("tf32", "high")), ("false", ("ieee", "highest"))],
)
def test_a_compiled_run_with_tf32_can_ask_for_the_precision_of_its_products(tmp_path, tf32, expected):
    assert run_ranks(precision_after_arguments, 1, tmp_path, tf32, joined=False) == [expected]
