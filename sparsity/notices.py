"""Warnings: which weights stay dense, which are frozen, and which layers have lost all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from sparsity.scope import Scope


def warn_on_rank_0(message: str) -> None:
    """Warn on the first process only, because the message is the same on all."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(message, stacklevel=3)


def collapse_notice(name: str, scope: Scope) -> str:
    """Return a notice that a parameter has lost its last weight, with a remedy that the scope allows."""
    remedy = "use scope=uniform" if scope.compares_parameters else "lower its sparsity, which leaves it no whole weight"
    return f"{name} has lost its last weight; name it in requires_dense, or {remedy}."


def left_out_notice(names: Sequence[str]) -> str | None:
    """Return a notice that names the matrices that no rule prunes; None if there are none."""
    if not names:
        return None
    verb = "stays" if len(names) == 1 else "stay"
    return (
        f"{_listed(names)} {verb} dense: only weights of linear layers and experts are pruned; to prune more, name "
        "everything to be pruned in include, or name these in requires_dense to say that they stay dense."
    )


def frozen_notice(chosen: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> str | None:
    """Return a notice of what is pruned and what is frozen; None if all linear weights are trained."""
    frozen = [name for name, weight in linear.items() if not weight.requires_grad]
    if not frozen:
        return None
    return (
        f"{sum(p.numel() for p in chosen.values()):,} weights are trained and pruned ({_listed(list(chosen))}); "
        f"{sum(linear[name].numel() for name in frozen):,} linear weights are frozen and stay as they are "
        f"({_listed(frozen)}) and are not counted in any density."
    )


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
