"""HSDP through accelerate on four gloo ranks: two replicas of the model, each sharded over two."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import run_command
from tests.interrupted import records_of
from tests.test_run import tiny, write_text


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_two_replicas_prune_and_train_what_one_process_does(tmp_path):
    """With a checkpoint in between: replicas that disagreed on a mask would end the run with an error."""
    write_text(tmp_path / "text.jsonl")
    own = {"one": ["launch.num_processes=1"], "replicas": ["launch.num_processes=4", "launch.num_replicas=2"]}
    said = {}
    for name, options in own.items():
        command = tiny(
            tmp_path, "logger=none", f"run_name={name}", "trainer.max_steps=8", "trainer.save_steps=5", *options
        )
        done = run_command(["launch", *command], timeout_s=280)
        assert done.returncode == 0, done.stderr[-3000:]
        said[name] = done.stderr
    assert "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 2" in said["replicas"]
    one, replicas = (tmp_path / "runs" / name for name in own)
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (one, replicas))
    assert found.keys() == expected.keys()
    assert sum(int((tensor == 0).sum()) for tensor in found.values()) > 20_000
    assert not [name for name in found if not torch.equal(found[name] == 0, expected[name] == 0)]
    for mine, theirs in zip(records_of(replicas), records_of(one), strict=True):
        for key in ("train/loss", "sparsity/density", "sparsity/threshold"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], abs=1e-4)
