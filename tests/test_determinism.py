"""`trainer.full_determinism=true` without a GPU: what it sets, and that steps run under it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from conf.compose import composed
from tests.distributed import run_ranks
from train.plan.run import plan_run


def settings_of_a_deterministic_run(folder: Path) -> dict[str, Any]:
    from train.determinism import compute_deterministically

    compute_deterministically()

    import torch

    from sparsity import Geometric, SparsityCallback
    from tests.small_trainer import small_trainer
    from train.arguments import training_arguments
    from train.distributed import join_world

    world = join_world(60)
    config = composed("train", ["experiment=demo", "trainer.full_determinism=true"])
    arguments = training_arguments(config, plan_run(config, 1), folder)
    trainer = small_trainer(folder, world=world, sparsity=SparsityCallback(Geometric(0.5, 1, 2, 1)))
    trainer.train()
    return {
        "by transformers": arguments.full_determinism,
        "CUDA_LAUNCH_BLOCKING": os.environ.get("CUDA_LAUNCH_BLOCKING"),
        "CUBLAS_WORKSPACE_CONFIG": os.environ["CUBLAS_WORKSPACE_CONFIG"],
        "FLASH_ATTENTION_DETERMINISTIC": os.environ["FLASH_ATTENTION_DETERMINISTIC"],
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "inductor": torch._inductor.config.deterministic,
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "sdpa": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()),
        "steps": trainer.state.global_step,
    }  # fmt: skip


def test_the_mode_asks_for_ordered_kernels_and_does_not_make_the_host_wait(tmp_path):
    assert run_ranks(settings_of_a_deterministic_run, 1, tmp_path, joined=False) == [
        {
            "by transformers": False,
            "CUDA_LAUNCH_BLOCKING": None,
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "FLASH_ATTENTION_DETERMINISTIC": "1",
            "algorithms": True,
            "only warns": False,
            "inductor": True,
            "cudnn": (True, False),
            "sdpa": (True, False),
            "steps": 4,
        }
    ]


def rank_main_calls(deterministic: bool) -> list[str]:
    """Return the first calls of `python -m train`, in order."""
    from omegaconf import OmegaConf

    from train import __main__ as entry
    from train import distributed

    calls: list[str] = []
    config = composed("train", ["experiment=demo", f"trainer.full_determinism={str(deterministic).lower()}"])

    def join_world(timeout_s: int) -> None:
        calls.append("join_world")
        raise KeyboardInterrupt

    entry.compute_deterministically = lambda: calls.append("compute_deterministically")
    distributed.join_world = join_world  # type: ignore[assignment]
    with contextlib.suppress(KeyboardInterrupt):
        entry.train(OmegaConf.structured(config))
    return calls


def test_a_rank_enters_the_mode_before_it_joins_the_world_and_only_when_asked():
    (asked,) = run_ranks(rank_main_calls, 1, True, joined=False)
    (plain,) = run_ranks(rank_main_calls, 1, False, joined=False)
    assert asked == ["compute_deterministically", "join_world"]
    assert plain == ["join_world"]
