"""HSDP through accelerate on four gloo ranks: two replicas of the model, each sharded over two."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import run_command
from tests.interrupted import interrupted, records_of


def test_two_replicas_prune_and_train_what_plain_sharding_does(folder, whole):
    """With a checkpoint in between: replicas that disagreed on a mask would end the run with an error."""
    command = interrupted(
        folder, "replicas", "logger=none", "launch.num_processes=4", "launch.num_replicas=2", "trainer.save_steps=30"
    )
    done = run_command(["launch", *command])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 2" in done.stderr
    found, expected = (load_file(run / "model" / "model.safetensors") for run in (folder / "runs" / "replicas", whole))
    assert found.keys() == expected.keys()
    zeros = [(name, found[name] == 0, expected[name] == 0) for name in found]
    assert all(torch.equal(mine, theirs) for _, mine, theirs in zeros), [
        n for n, a, b in zeros if not torch.equal(a, b)
    ]
    for mine, theirs in zip(records_of(folder / "runs" / "replicas"), records_of(whole), strict=True):
        if "train/loss" in theirs:
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)
            assert mine["sparsity/density"] == theirs["sparsity/density"]
