"""HSDP through accelerate on gloo ranks: two replicas of the model, each sharded over two or three."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.commands import run_command
from tests.distributed import run_ranks
from tests.interrupted import records_of
from tests.test_run import tiny, write_text


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_two_replicas_prune_and_train_what_one_process_does(tmp_path):
    """The run has a checkpoint; replicas that disagreed on a mask would end it with an error."""
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


def norms_of_two_replicas() -> dict[str, Any]:
    """Return the norms of two replicas of three ranks, which sum 1.7^2 and two small squares in opposite orders."""
    from train.clipping import clip_replicas_alike_, has_replicas

    mesh = DeviceMesh("cpu", [[0, 1, 2], [5, 4, 3]], mesh_dim_names=("replicate", "shard"))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    value = 1.7 if coordinate[1] == 0 else 1.3 * 2.0**-12

    def sharded(local: torch.Tensor) -> DTensor:
        return DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False)

    param = nn.Parameter(sharded(torch.ones(1)))
    param.grad = sharded(torch.full((1,), value))
    usual = torch.nn.utils.get_total_norm([param.grad]).full_tensor()
    norm = clip_replicas_alike_([param], max_norm=1.0)
    return {
        "usual": float(usual),
        "norm": float(norm),
        "gradient": float(param.grad.to_local()),
        "shard": coordinate[1],
        "has_replicas": has_replicas([param]),
        "plain has": has_replicas([nn.Parameter(torch.ones(1))]),
    }


def test_replicas_clip_by_the_same_number_whatever_order_they_sum_in():
    ranks = run_ranks(norms_of_two_replicas, 6, timeout_s=240)
    assert len({found["usual"] for found in ranks}) == 2
    assert {found["norm"] for found in ranks} == {ranks[0]["usual"]}
    for shard in range(3):
        assert len({found["gradient"] for found in ranks if found["shard"] == shard}) == 1
    assert ranks[0]["gradient"] == pytest.approx(1.0, abs=1e-5)
    assert all(found["has_replicas"] and not found["plain has"] for found in ranks)


def train_two_replicas(folder: Path) -> dict[str, Any]:
    """Train two steps on a 2 x 2 mesh; return the timeouts of all groups, and the norms by which gradients were clipped."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    }  # fmt: skip
    from tests.small_trainer import small_trainer
    from train import trainer as trainers
    from train.distributed import PREPARATION_LIMIT, join_world

    norms = []
    clip = trainers.clip_replicas_alike_
    trainers.clip_replicas_alike_ = lambda *args: norms.append(clip(*args)) or norms[-1]
    world = join_world(60)
    trainer = small_trainer(folder, world=world, ddp_timeout=77, max_steps=2)
    trainer.train()
    timeouts = {
        group: group._get_backend(torch.device("cpu")).options._timeout for group in dist.distributed_c10d._world.pg_map
    }
    assert timeouts.pop(world.control) == PREPARATION_LIMIT
    return {
        "timeouts": set(timeouts.values()),
        "num_groups": len(timeouts),
        "norms": [float(norm) for norm in norms],
        "logged": [record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record],
    }


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(train_two_replicas, 4, tmp_path_factory.mktemp("hsdp"), joined=False, timeout_s=280)


def test_every_group_of_the_mesh_has_the_runs_timeout(two_replicas):
    for found in two_replicas:
        # These are the world, a shard group, a replica group and the flattened ones.
        assert found["num_groups"] >= 3
        assert found["timeouts"] == {timedelta(seconds=77)}


def test_the_trainer_clips_its_replicas_alike(two_replicas):
    for found in two_replicas:
        assert len(found["norms"]) == 2
        assert found["norms"] == found["logged"] == two_replicas[0]["norms"]
