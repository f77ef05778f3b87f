"""Muon in a run of our Trainer, on each layout: every update is torch's own Muon and AdamW, and pruned entries stay 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.distributed import run_ranks

STEPS, RESUMED_STEP = 4, 2
"""Steps of a run that prunes before steps 1 and 2, and the step at which it is saved and resumed."""


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a full tensor. Every rank calls it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def updated(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """Return `weight` after an update by torch's own Muon or AdamW, in one process."""
    param = nn.Parameter(weight.clone())
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    optimizer: torch.optim.Optimizer
    if group["muon"]:
        optimizer = torch.optim.Muon([param], adjust_lr_fn="match_rms_adamw", **options)
    else:
        optimizer = torch.optim.AdamW([param], betas=group["betas"], eps=group["eps"], foreach=False, **options)
    if state:
        optimizer.state[param] = {name: value.clone() for name, value in state.items()}
    param.grad = gradient
    optimizer.step()
    return param.detach()


class Watch(TrainerCallback):
    """A callback that computes each update once more and counts what differs, on this rank."""

    def __init__(self, sparsity: Any) -> None:
        self.sparsity = sparsity
        self.expected: dict[str, Tensor] = {}
        self.wrong: list[str] = []
        self.num_compared = self.num_pruned = 0
        self.dtypes: set[torch.dtype] = set()
        self.before: dict[str, Tensor] = {}
        """Weights and states before the update of RESUMED_STEP, by name."""

    def parts(self, model: nn.Module, optimizer: Any) -> Any:
        from sparsity.mask import state_holder
        from sparsity.prunable import plain_name

        holder = state_holder(optimizer)
        groups = {id(param): group for group in holder.param_groups for param in group["params"]}
        for name, param in model.named_parameters():
            yield plain_name(name), param, holder.state.get(param, {}), groups[id(param)]

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        for name, param, states, group in self.parts(model, optimizer):
            assert param.grad is not None
            weight, gradient = whole(param), whole(param.grad)
            full = {key: whole(value) for key, value in states.items()}
            self.expected[name] = updated(weight, gradient, full, group)
            if state.global_step == RESUMED_STEP:
                self.before |= {name: weight, **{f"{key} of {name}": value for key, value in full.items()}}
            self.check_zeros(name, param.grad)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        from sparsity.shards import local_tensor
        from train.checkpoints.contents import local_rows

        for name, param, states, _ in self.parts(model, optimizer):
            start, stop = local_rows(param)
            expected, found = self.expected[name][start:stop], local_tensor(param.detach())
            if (mask := self.masks().get(name)) is not None:
                expected = torch.where(mask.view(expected.shape), expected, 0.0)
                self.num_pruned += int((~mask).sum())
            if not torch.equal(found, expected):
                self.wrong.append(f"{name} after step {state.global_step}")
            self.num_compared += 1
            tensors = [param, *(value for value in states.values() if value.shape == param.shape)]
            self.dtypes |= {tensor.dtype for tensor in tensors}
            for tensor in tensors:
                self.check_zeros(name, tensor)

    def masks(self) -> dict[str, Tensor]:
        return {shard.name: shard.mask for shard in self.sparsity.shards}

    def check_zeros(self, name: str, tensor: Tensor) -> None:
        from sparsity.shards import local_values

        if (mask := self.masks().get(name)) is not None and (local_values(tensor)[~mask] != 0).any():
            self.wrong.append(f"an entry of {name} that is pruned is not 0")


def fsdp(**more: str) -> dict[str, str]:
    return {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", **more,
    }  # fmt: skip


def replicas(number: int, shards: int) -> dict[str, str]:
    return fsdp(
        ACCELERATE_USE_PARALLELISM_CONFIG="true",
        PARALLELISM_CONFIG_DP_REPLICATE_SIZE=str(number),
        PARALLELISM_CONFIG_DP_SHARD_SIZE=str(shards),
    )


def train(folder: Path, environment: dict[str, str], resumes: bool = False, **changes: Any) -> dict[str, Any]:
    """Train on this rank, in steps of eight rows on any number of ranks, and return what a Watch saw."""
    os.environ |= environment
    from sparsity import Geometric, SparsityCallback
    from tests.small_trainer import small_llama, small_trainer
    from train.distributed import join_world

    world = join_world(60)
    sparsity = SparsityCallback(Geometric(sparsity=0.5, start_step=1, end_step=2, every_steps=1), report=False)
    trainer = small_trainer(
        folder, world=world, model=small_llama(intermediate_size=63), sparsity=sparsity, uses_muon=True, max_steps=STEPS,
        per_device_train_batch_size=1, gradient_accumulation_steps=8 // world.size, save_strategy="steps",
        save_steps=RESUMED_STEP, save_total_limit=5, weight_decay=0.1, **changes,
    )  # fmt: skip
    watch = Watch(sparsity)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{RESUMED_STEP}") if resumes else None)
    return {
        "wrong": watch.wrong,
        "num_compared": watch.num_compared,
        "num_pruned": watch.num_pruned,
        "dtypes": watch.dtypes,
        "before": watch.before,
        "losses": trainer.step_losses().tolist(),
        "weights": {name: whole(param) for name, param in trainer._module.named_parameters()},
        "precision": trainer.accelerator.mixed_precision,
        "num_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "placements": {str(getattr(param, "placements", "plain")) for param in trainer._module.parameters()},
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the result of the run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_ranks(train, 1, folder, {}, joined=False)[0]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder and the results of the run on two FSDP2 ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_ranks(train, 2, folder, fsdp(), joined=False, timeout_s=240)


def check(found: dict[str, Any], placements: str, alone: dict[str, Any], tolerance: float, steps: int = STEPS) -> None:
    assert found["wrong"] == []
    assert found["num_compared"] == steps * 21
    assert found["num_pruned"] > 10_000
    assert found["dtypes"] == {torch.float32}
    assert found["placements"] == {placements}
    assert found["losses"] == pytest.approx(alone["losses"], abs=tolerance)


def test_one_process_with_accumulation_updates_as_torchs_optimizers_do(alone):
    check(alone[1], "plain", alone[1], 0)


def test_two_fsdp2_ranks_update_as_torchs_optimizers_do(sharded, alone):
    for found in sharded[1]:
        check(found, "(Shard(dim=0),)", alone[1], 2e-3)


@pytest.mark.parametrize(
    ("environment", "num_ranks", "placements"),
    [
        (replicas(2, 2), 4, "(Replicate(), Shard(dim=0))"),
        ({}, 2, "plain"),
    ],
    ids=["two replicas of two shards", "DDP"],
)
def test_replicas_update_as_torchs_optimizers_do_and_stay_equal(tmp_path, alone, environment, num_ranks, placements):
    ranks = run_ranks(train, num_ranks, tmp_path, environment, joined=False, timeout_s=280)
    for found in ranks:
        check(found, placements, alone[1], 2e-3)
        assert all(torch.equal(found["weights"][name], weight) for name, weight in ranks[0]["weights"].items())


def train_with(folder: Path, environment: dict[str, str], changes: dict[str, Any]) -> dict[str, Any]:
    return train(folder, environment, **changes)


def test_bf16_and_compiled_blocks_update_float32_weights_as_torchs_optimizers_do(tmp_path, alone):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "bf16": True}
    for found in run_ranks(train_with, 2, tmp_path, fsdp(), compiled, joined=False, timeout_s=280):
        check(found, "(Shard(dim=0),)", alone[1], 0.03)
        assert found["precision"] == "bf16"
        assert found["num_graphs"] > 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_resumes_on_another_number_of_ranks_with_the_same_momenta(alone, sharded, num_ranks):
    folder, written = (sharded[0], sharded[1][0]) if num_ranks == 1 else alone
    environment = fsdp() if num_ranks > 1 else {}
    for found in run_ranks(train, num_ranks, folder, environment, True, joined=False, timeout_s=240):
        assert found["before"].keys() == written["before"].keys()
        assert sum(name.startswith("momentum_buffer of") for name in written["before"]) == 14
        assert all(torch.equal(found["before"][name], value) for name, value in written["before"].items())
        check(found, "(Shard(dim=0),)" if num_ranks > 1 else "plain", alone[1], 2e-3, STEPS - RESUMED_STEP)
