"""Magnitude pruning of sharded models: schedules, exact selection, masks, and the callback that applies them.

Names are handed on lazily (PEP 562), so that `sparsity.schedule` can be used before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsity.callback import SparsityCallback
    from sparsity.prunable import prunable_parameters
    from sparsity.pruner import Pruner
    from sparsity.schedule import Constant, Cubic, Fixed, Geometric, Linear, OneShot, Schedule
    from sparsity.scope import Group
    from sparsity.select import prune_smallest_

_HOMES = {
    "Constant": "sparsity.schedule",
    "Cubic": "sparsity.schedule",
    "Fixed": "sparsity.schedule",
    "Geometric": "sparsity.schedule",
    "Group": "sparsity.scope",
    "Linear": "sparsity.schedule",
    "OneShot": "sparsity.schedule",
    "Pruner": "sparsity.pruner",
    "Schedule": "sparsity.schedule",
    "SparsityCallback": "sparsity.callback",
    "prunable_parameters": "sparsity.prunable",
    "prune_smallest_": "sparsity.select",
}
__all__ = [
    "Constant", "Cubic", "Fixed", "Geometric", "Group", "Linear", "OneShot", "Pruner", "Schedule", "SparsityCallback",
    "prunable_parameters", "prune_smallest_",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsity' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
