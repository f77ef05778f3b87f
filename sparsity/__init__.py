"""Magnitude pruning of sharded models: schedules, exact selection, masks, and the callback that applies them.

Names are imported on first use (PEP 562), so that `sparsity.schedule` can be used before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsity.callback import SparsityCallback
    from sparsity.prunable import prunable_parameters
    from sparsity.pruner import Pruner
    from sparsity.schedule import Alternating, Constant, Cubic, Fixed, Geometric, Linear, OneShot, Ramp, Schedule
    from sparsity.scope import Group, Scope
    from sparsity.score import Score
    from sparsity.select import prune_smallest_
    from sparsity.update import AcDc, Rigl, Set, Ste, Update

_HOMES = {
    "AcDc": "sparsity.update",
    "Alternating": "sparsity.schedule",
    "Constant": "sparsity.schedule",
    "Cubic": "sparsity.schedule",
    "Fixed": "sparsity.schedule",
    "Geometric": "sparsity.schedule",
    "Group": "sparsity.scope",
    "Linear": "sparsity.schedule",
    "OneShot": "sparsity.schedule",
    "Pruner": "sparsity.pruner",
    "Ramp": "sparsity.schedule",
    "Rigl": "sparsity.update",
    "Schedule": "sparsity.schedule",
    "Scope": "sparsity.scope",
    "Score": "sparsity.score",
    "Set": "sparsity.update",
    "SparsityCallback": "sparsity.callback",
    "Ste": "sparsity.update",
    "Update": "sparsity.update",
    "prunable_parameters": "sparsity.prunable",
    "prune_smallest_": "sparsity.select",
}
__all__ = [
    "AcDc", "Alternating", "Constant", "Cubic", "Fixed", "Geometric", "Group", "Linear", "OneShot", "Pruner", "Ramp", "Rigl",
    "Schedule", "Scope", "Score", "Set", "SparsityCallback", "Ste", "Update", "prunable_parameters", "prune_smallest_",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsity' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
