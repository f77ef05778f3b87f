"""A pretended GPU: tensors whose numbers are in the host's memory, but that behave as if they were on a device.

Code that mixes tensors of the host and of the device, or gives a tensor of the device to numpy, raises as on a GPU. Only
operations of torch run there; kernels and FSDP2 need a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put_")
"""Operations that take indices on the host for a tensor on the GPU."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU
        )
        made.held = held.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    def cpu(self, *_: Any) -> Tensor:
        return self.to(CPU)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        if device is not None and device.type == "cpu":
            return self.held.to(dtype=dtype, copy=True)
        return super().to(dtype=dtype or self.dtype, copy=kwargs.get("copy", False))

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """torch.tensor makes a tensor without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        found = func(*args, **kwargs)
        return found if device is None else found.to(device)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the numbers; its result is on the GPU if it was asked for there, or if its arguments are there."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if name in INDEXING and isinstance(args[0], OnGpu):
        tensors = [leaf for leaf in (args[0], *args[2:]) if isinstance(leaf, Tensor)]
    is_mixed = there and any(tensor.dim() > 0 for tensor in tensors if not isinstance(tensor, OnGpu))
    if is_mixed and name not in COPIES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got some on cuda:0 and some on cpu."
        )
    generator, device = kwargs.get("generator"), kwargs.get("device")
    if device is not None:
        is_there = torch.device(device).type == "cuda"
    elif name == "aten::copy_":
        is_there = isinstance(args[0], OnGpu)
    else:
        is_there = bool(there)
    if generator is not None and is_there:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' in {name}.")
    if is_there and kwargs.get("pin_memory"):
        raise RuntimeError("only dense CPU tensors can be pinned")
    wrappers = {id(tensor.held): tensor for tensor in there}
    plain = tree_map_only(OnGpu, lambda tensor: tensor.held, (tuple(args), dict(kwargs)))
    if device is not None:
        plain[1]["device"] = CPU
    found = func(*plain[0], **plain[1])
    if not is_there:
        return found
    return tree_map_only(Tensor, lambda one: wrappers[id(one)] if id(one) in wrappers else OnGpu(one), found)


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Yield the device; inside, tensors can be made on it or moved to it."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    # The device's random numbers have one state, which nothing here changes.
    own = {
        "_lazy_init": lambda: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8, device=CPU),
        "set_rng_state": lambda state, device=None: None,
    }
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.multiple(torch.cuda, **own), _FromNumbers(), _Factories():
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
