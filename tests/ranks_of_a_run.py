"""Running a training command on ranks that are forked from a server with torch imported: this saves seconds per run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tests.distributed import run_ranks

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""The variables that accelerate sets for launch/accelerate/cpu.yaml."""


def train_on_ranks(num_ranks: int, overrides: Sequence[str], timeout_s: float = 240) -> None:
    """Train one run to its end, on one rank without FSDP2 or on several ranks with it."""
    run_ranks(_train, num_ranks, list(overrides), timeout_s=timeout_s, joined=False)


def _train(overrides: list[str]) -> None:
    from conf.compose import composed
    from train.distributed import join_world
    from train.faults.heartbeat import Heartbeat
    from train.faults.preempt import Preemption
    from train.plan.run import plan_run
    from train.run import run

    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"} | (FSDP2 if num_ranks > 1 else {})
    config = composed("train", overrides)
    plan = plan_run(config, num_ranks)
    world = join_world(config.trainer.ddp_timeout)
    run(config, plan, world, Preemption(), Heartbeat(world.rank, world.size))
