"""Global magnitude pruning of sharded models: schedules, exact selection, masks, and the callback that applies them.

Names are handed on lazily (PEP 562), so that `sparsity.schedule` can be used before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsity.callback import SparsityCallback
    from sparsity.prunable import prunable_parameters
    from sparsity.schedule import Geometric, Schedule
    from sparsity.select import prune_smallest_

_HOMES = {
    "Geometric": "sparsity.schedule",
    "Schedule": "sparsity.schedule",
    "SparsityCallback": "sparsity.callback",
    "prunable_parameters": "sparsity.prunable",
    "prune_smallest_": "sparsity.select",
}
__all__ = ["Geometric", "Schedule", "SparsityCallback", "prunable_parameters", "prune_smallest_"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsity' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
