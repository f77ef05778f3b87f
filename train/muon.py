"""Muon on sharded weights: it updates the matrices of the blocks, and AdamW updates all other parameters.

`torch.optim.Muon` orthogonalises a whole matrix and does not support DTensors. Here each rank gathers the momentum of
one matrix at a time, orthogonalises it as `torch.optim.Muon` does, and updates its own rows. The update is the same for
any number of ranks, but every rank computes the same products. Experts [expert, out, in] are treated as separate
matrices.

The update of a pruned weight is not 0, since orthogonalising mixes all weights of a matrix; `sparsity` writes the zeros
again after each update. The gradient and the momentum of a pruned weight are exactly 0 and stay 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from sparsity.prunable import linear_weights, own_linear_weights, plain_name
from sparsity.shards import local_tensor, shard_dim
from train.checkpoints.contents import local_rows

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The coefficients of the quintic Newton-Schulz iteration (Keller Jordan's Muon), as in torch.optim.Muon."""
NUM_ITERATIONS = 5
MOMENTUM = 0.95
EPS = 1e-7
RMS_OF_ADAMW = 0.2
"""The factor that makes an update as large as AdamW's, so that both share a learning rate and a decay (arXiv 2502.16982)."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return, approximately, the semi-orthogonal matrix nearest to each of `matrices` [(n,) rows, columns], in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x[None] if matrices.dim() == 2 else x
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x
    return x[0] if matrices.dim() == 2 else x


def update_scale(shape: torch.Size) -> float:
    """Return the factor that makes an orthogonal update of `shape` as large as AdamW's."""
    return RMS_OF_ADAMW * math.sqrt(max(shape[-2:]))


class MuonAdamW(torch.optim.Optimizer):
    """An optimizer that uses Muon for the groups with `muon=True` and AdamW for the others.

    Collective: every rank calls `step`.

    Args:
        groups: Parameter groups, each with a bool `muon`.
        lr: The learning rate of both.
        weight_decay: The decoupled weight decay of both.
        betas: The betas of AdamW.
        eps: The epsilon of AdamW.
        momentum: The Nesterov momentum of Muon.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = MOMENTUM,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have gradients; return the loss of `closure` if it is given."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            update(group, [param for param in group["params"] if param.grad is not None])
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            gradient, momentum = param.grad, state["momentum_buffer"]
            momentum.lerp_(gradient, 1 - group["momentum"])
            rows = _update_of_rows(gradient.lerp(momentum, group["momentum"]))
            local = local_tensor(param)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(rows.to(local.dtype), alpha=-group["lr"] * update_scale(param.shape))

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        adamw(
            [local_tensor(param) for param in params],
            [local_tensor(param.grad) for param in params if param.grad is not None],
            [local_tensor(self.state[param]["exp_avg"]) for param in params],
            [local_tensor(self.state[param]["exp_avg_sq"]) for param in params],
            [],
            [self.state[param]["step"] for param in params],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _update_of_rows(momentum: Tensor) -> Tensor:
    """Return this rank's rows of the orthogonalised matrix. Whole experts on a rank are not gathered."""
    if not isinstance(momentum, DTensor):
        return orthogonalised(momentum)
    if momentum.dim() == 3 and shard_dim(momentum) is not None:
        return orthogonalised(local_tensor(momentum))
    start, stop = local_rows(momentum)
    return orthogonalised(momentum.full_tensor())[start:stop]


def check_not_offloaded(accelerator: Any) -> None:
    """Refuse parameters that FSDP2 keeps in host memory: their momentum cannot be gathered between GPUs.

    Raises:
        ValueError: The accelerate config offloads them.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "optim=muon gathers momenta between GPUs, but the accelerate config keeps them in host memory "
            "(fsdp_offload_params: true): set it to false, or use optim=adamw."
        )


def muon_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that Muon updates: the blocks' linear weights, not head and embeddings."""
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    outside = {id(head.weight)} if head is not None else set()
    own = own_linear_weights(model)
    return [
        plain_name(name) for name, weight in linear_weights(model).items() if name in own and id(weight) not in outside
    ]


def make_muon(model: nn.Module, arguments: Any) -> MuonAdamW:
    """Return the model's optimizer, with the learning rate, weight decay and betas of TrainingArguments."""
    chosen = set(muon_names(model))
    named = [(plain_name(name), param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"params": [param for name, param in named if (name in chosen) == muon], "muon": muon} for muon in (True, False)
    ]
    return MuonAdamW(
        groups,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )
