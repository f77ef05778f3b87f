"""Checkpoints of another Trainer hold only weights: which of their zeros are pruned, and which wrappers hide weights."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, OffloadPolicy, fully_shard
from torch.torch_version import TorchVersion
from transformers import TrainerControl, TrainerState

from sparsity import Geometric, SparsityCallback
from sparsity import resume as sparsity_resume
from sparsity.resume import STATE_KEY, surviving_zeros
from sparsity.shards import ParameterShard, RankLayout
from sparsity.wrappers import check_weights_are_in_reach
from tests.distributed import run_ranks, shard_by_layers
from tests.test_distributed import full_masks


def sharded_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Linear(7, 4, bias=False))
    shard_by_layers(model, model)
    return model


def bound(model: nn.Module) -> SparsityCallback:
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    return callback


def kill_survivors(callback: SparsityCallback) -> None:
    """Set the first kept weight of each of this rank's shards to exactly 0."""
    for shard in callback.shards:
        shard.values[int(shard.mask.nonzero()[0])] = 0.0


def resume_on_two_ranks() -> dict[str, Any]:
    model = sharded_model()
    callback = bound(model)
    callback.pruner.prune(0.5)
    kill_survivors(callback)
    state = TrainerState(global_step=1)
    callback.on_step_end(None, state, TrainerControl(should_save=False))
    assert STATE_KEY not in state.stateful_callbacks
    callback.on_step_end(None, state, TrainerControl(should_save=True))
    saved = json.loads(json.dumps(state.stateful_callbacks[STATE_KEY]))
    found: dict[str, Any] = {"listed": sum(map(len, saved["surviving_zeros"].values()))}

    resumed = bound(model)
    resumed.restore(1, saved)
    found["same masks"] = all(
        torch.equal(*masks) for masks in zip(full_masks(callback), full_masks(resumed), strict=True)
    )
    found["density"] = resumed.density

    def refusal(saved: dict[str, Any] | None) -> str:
        try:
            bound(model).restore(1, saved)
        except ValueError as error:
            return str(error)
        return ""

    found["without state"] = refusal(None)
    found["state of another step"] = refusal({**saved, "step": 0})
    found["too many to list"] = refusal({**saved, "surviving_zeros": None})
    # There are as many zeros as before, but one of them is in the other layer.
    first, second = callback.shards
    if dist.get_rank() == 0:
        first.values[int((first.values == 0).nonzero()[0])] = 1.0
        second.values[int(second.values.nonzero()[0])] = 0.0
    found["a zero elsewhere"] = refusal(saved)
    for shard in callback.shards:
        shard.values.fill_(1.0)
    found["lost zeros"] = refusal(saved)
    found["FSDP1"] = refusal_under_fsdp1()
    return found


def refusal_under_fsdp1() -> str:
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    try:
        SparsityCallback(Geometric(0.5, 0, 0, 1)).on_train_begin(
            SimpleNamespace(deepspeed_plugin=None), TrainerState(max_steps=1), TrainerControl(), model=model
        )
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def resumed() -> list[dict[str, Any]]:
    return run_ranks(resume_on_two_ranks, 2)


def test_survivors_that_are_zero_by_chance_are_told_from_pruned_weights(resumed):
    for found in resumed:
        assert found["listed"] == 4
        assert found["same masks"]
        assert found["density"] == 0.5


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("without state", "has 39 zero weights, but 35 are pruned after step 0"),
        ("state of another step", "has 39 zero weights, but 35 are pruned after step 0"),
        ("too many to list", "The mask of 0.weight keeps"),
        ("a zero elsewhere", "The mask of 0.weight keeps"),
        ("lost zeros", "The mask of 0.weight keeps"),
    ],
)
def test_zeros_that_cannot_be_told_apart_are_refused_on_every_rank(resumed, case, words):
    for found in resumed:
        assert words in found[case]


def test_more_zeros_than_can_be_listed_are_not(monkeypatch):
    monkeypatch.setattr(sparsity_resume, "MAX_LISTED", 3)
    values = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    kept = torch.tensor([True, True, True, True, False, True])
    assert surviving_zeros([ParameterShard("w", values, kept, 10, 16)], RankLayout()) == {"w": [10, 12, 13]}
    monkeypatch.setattr(sparsity_resume, "MAX_LISTED", 2)
    assert surviving_zeros([ParameterShard("w", values, kept, 10, 16)], RankLayout()) is None


def test_fsdp1_is_refused_by_the_callback(resumed):
    for found in resumed:
        assert "wrapped in FSDP1, which flattens its parameters" in found["FSDP1"]


def test_deepspeed_is_refused_by_the_callback():
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    with pytest.raises(ValueError, match=r"trained by DeepSpeed.*train with FSDP2"):
        callback.on_train_begin(
            SimpleNamespace(deepspeed_plugin=object()),
            TrainerState(max_steps=1),
            TrainerControl(),
            model=nn.Linear(4, 4),
        )
    partitioned = nn.Linear(4, 4)
    partitioned.weight.ds_id = 0
    with pytest.raises(ValueError, match="trained by DeepSpeed"):
        check_weights_are_in_reach(partitioned)
    check_weights_are_in_reach(nn.Linear(4, 4), SimpleNamespace(deepspeed_plugin=None))


def refusals_of_offloading() -> dict[str, str]:
    """Return the errors about CPU offload, for torch 2.12.1 and 2.13.0, with and without pinned memory, and without offload."""
    cases = {
        "2.12.1": CPUOffloadPolicy(), "2.13.0": CPUOffloadPolicy(),
        "2.12.1, pageable": CPUOffloadPolicy(pin_memory=False), "2.12.1, none": OffloadPolicy(),
    }  # fmt: skip
    said = {}
    for case, policy in cases.items():
        torch.__version__ = TorchVersion(case.partition(",")[0])
        # Without a GPU there is no pinned memory; on the meta device FSDP2 does not use any yet.
        model = nn.Sequential(nn.Linear(4, 4, device="meta"))
        fully_shard(model[0], offload_policy=policy)
        fully_shard(model, offload_policy=policy)
        try:
            check_weights_are_in_reach(model)
            said[case] = ""
        except ValueError as error:
            said[case] = str(error)
    return said


def test_cpu_offload_is_refused_by_torch_that_masks_gradients_on_their_way():
    for said in run_ranks(refusals_of_offloading, 2):
        assert "torch 2.12.1 still copies a gradient there while it is masked" in said["2.12.1"]
        assert said["2.12.1"].endswith("install torch 2.13, or set fsdp_offload_params: false.")
        assert said["2.13.0"] == said["2.12.1, pageable"] == said["2.12.1, none"] == ""
