"""The check that a model can start from random weights: transformers' `_init_weights` must write every parameter."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import ModelConfig
from train.model.weights import initialise, no_values
from train.plan.architecture import meta_model


class WrittenStorages(TorchDispatchMode):
    """A mode that records the storages that operations write to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record the tensors that its schema says are written in place."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor):
                self.found.add(value.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


def check_drawable(model: ModelConfig) -> None:
    """Refuse a model by `path` whose initialization leaves a parameter without values, before the text is prepared.

    A copy on the meta device, which takes no memory, is initialized and watched.

    Raises:
        ValueError: A parameter gets no values.
    """
    copy = deepcopy(meta_model(model))
    written = WrittenStorages()
    try:
        with torch.no_grad(), written:
            initialise(copy, copy, True, model.init)
    except Exception:
        # What works only with real values is found when they are drawn.
        return
    for name, param in copy.named_parameters():
        if param.untyped_storage()._cdata not in written.found:
            raise no_values(copy, name)
