"""Runs of a small model whose masks move, on one process or several, for tests of the updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState

from sparsity import Constant, Cubic, Geometric, SparsityCallback
from sparsity.schedule import Alternating, Schedule
from sparsity.shards import local_tensor
from sparsity.update import AcDc, Rigl, Set, Ste, Update

NUM_STEPS, EVERY, SHARE, END = 16, 3, 0.5, 0.75
"""Masks move before or at steps 3, 6 and 9; the cosine ends at step 12. Two steps after a move, new weights are unequal."""
SHAPES = {"0.weight": (6, 5), "2.weight": (4, 6)}
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-3}
Tensors = dict[str, Tensor]
CASES: dict[str, tuple[Schedule, Update, str]] = {
    "set": (Constant(0.6), Set(SHARE, EVERY, END), "uniform"),
    "rigl": (Constant(0.6), Rigl(SHARE, EVERY, END), "uniform"),
    "rigl, global": (Constant(0.6), Rigl(SHARE, EVERY, END), "global"),
    "rigl, erk": (Constant(0.6), Rigl(SHARE, EVERY, END), "erk"),
    "granet": (Cubic(0.7, 1, 7, 2), Rigl(SHARE, EVERY, END), "uniform"),
    "ste": (Constant(0.6), Ste(SHARE, EVERY, END), "global"),
    "ste, gradual": (Geometric(0.7, 1, 7, 3), Ste(SHARE, EVERY, END), "uniform"),
    "acdc": (Alternating(0.6, 2, 8, 3), AcDc(), "global"),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))


def batch(step: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def loss_of(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return (forward(inputs) - inputs.cumsum(1)[:, :4]).square().mean()


# --- the project's way ---


class Run:
    """A run on all ranks, each of which has its part of every batch, in two micro-batches."""

    def __init__(self, case: str, layout: str = "one") -> None:
        self.model: nn.Module = make_model()
        parts: list[nn.Module] = [self.model[0], self.model[2], self.model]  # type: ignore[index]
        if layout in ("fsdp2", "hsdp"):
            shape = (2, dist.get_world_size() // 2) if layout == "hsdp" else (dist.get_world_size(),)
            names = ("replicate", "shard") if layout == "hsdp" else ("shard",)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for part in parts:
                fully_shard(part, mesh=mesh)
        if layout == "ddp":
            self.model = DistributedDataParallel(self.model)
        schedule, update, scope = CASES[case]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **OPTIONS)
        self.callback = SparsityCallback(schedule, update=update, scope=scope, seed=3, report=False)
        self.callback.bind(self.model)
        self.callback.rule.prepare(NUM_STEPS)
        self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.history: list[tuple[Tensors, Tensors]] = []

    def train(self, start: int = 0, stop: int = NUM_STEPS) -> None:
        for step in range(start, stop):
            state, rank, world = TrainerState(global_step=step), *self.ranks
            self.callback.on_step_begin(None, state, None, optimizer=self.optimizer)
            mine = batch(step)[rank * 8 // world : (rank + 1) * 8 // world]
            for micro in mine.chunk(2):
                (loss_of(self.model, micro) / 2).backward()
            self.callback.on_pre_optimizer_step(None, state, None, model=self.model, optimizer=self.optimizer)
            self.optimizer.step()
            self.callback.on_optimizer_step(None, state, None, optimizer=self.optimizer)
            self.optimizer.zero_grad()
            self.history.append((self.masks(), self.weights()))

    def masks(self) -> Tensors:
        found = {}
        for (name, param), shard in zip(self.callback.pruner.parameters.items(), self.callback.shards, strict=True):
            mask = shard.mask.view(local_tensor(param).shape).clone()
            if isinstance(param, DTensor):
                mask = DTensor.from_local(
                    mask, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
                ).full_tensor()
            found[name] = mask
        return found

    def weights(self) -> Tensors:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.callback.pruner.parameters.items()
        }


def history_of(case: str, layout: str = "one") -> tuple[list[tuple[Tensors, Tensors]], float]:
    run = Run(case, layout)
    run.train()
    return run.history, run.callback.average_density
