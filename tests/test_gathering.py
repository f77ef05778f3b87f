"""Ranks that would gather weights differently are refused before the first of them waits for the others."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from train.distributed import World, check_ranks_gather_alike


def refusal(choices: list[bool]) -> str:
    """Return the error if rank i frees gathered weights when `choices[i]` is true."""
    rank = dist.get_rank()
    plugin = SimpleNamespace(reshard_after_forward=choices[rank])
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    try:
        check_ranks_gather_alike(World(rank, dist.get_world_size(), torch.device("cpu")), accelerator)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return ""


def refusals() -> list[str]:
    return [refusal([True, False]), refusal([False, False])]


def test_machines_that_chose_differently_are_told_to_set_it():
    for different, alike in run_ranks(refusals, 2):
        assert "launch.reshard_after_forward=auto came out as true on one machine and as false on another" in different
        assert alike == ""
