"""The expected results of kernels, computed on the CPU by numpy from copies, and shards to run the kernels on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsity.shards import ParameterShard

DTYPES = ["float32", "bfloat16", "float16"]
SIZES = (5_000, 1, 0, 4_096, 333)
KINDS = ["normal", "ties", "denormal", "mostly zeros", "mixed"]


def tensors_of(kind: str, dtype: str, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Return weights on the CPU, with NaN, both infinities and -0.0 among them."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(size, generator=generator) for size in sizes]
    if kind == "ties":
        found = [(tensor * 3).round() / 4 for tensor in found]
    elif kind == "denormal":
        found = [tensor * (1e-42 if dtype == "float32" else 1e-39 if dtype == "bfloat16" else 1e-6) for tensor in found]
    elif kind == "mostly zeros":
        found = [tensor * (tensor > 1) for tensor in found]
    found[0][:5] = torch.tensor([float("nan"), float("-inf"), -0.0, float("inf"), 0.0])
    types = [dtype] if kind != "mixed" else [dtype, "float32", "bfloat16"]
    return [tensor.to(getattr(torch, types[i % len(types)])) for i, tensor in enumerate(found)]


def shards_on(device: str, tensors: list[Tensor], offset: int = 0) -> list[ParameterShard]:
    """Return shards with copies of the tensors; each copy begins `offset` elements after the start of its memory.

    The last third of each mask is pruned.
    """
    shards = []
    for number, tensor in enumerate(tensors):
        values = torch.empty(len(tensor) + offset, dtype=tensor.dtype, device=device)[offset:]
        mask = torch.empty(len(tensor) + offset, dtype=torch.bool, device=device)[offset:]
        values.copy_(tensor)
        mask.copy_(torch.arange(len(tensor)) < len(tensor) - len(tensor) // 3)
        shards.append(ParameterShard(f"p{number}", values, mask, 0, len(tensor)))
    return shards


def keys_of(tensor: Tensor) -> np.ndarray:
    """Return int64 keys from a CPU copy: the bits of |w| as float32."""
    return np.abs(tensor.detach().cpu().float().numpy()).view(np.uint32).astype(np.int64)


def zeroed(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a copy on the CPU with zeros where the mask is False."""
    found = tensor.detach().cpu().clone()
    found.view(-1)[~mask.cpu().view(-1)] = 0
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit, including NaN and the signs of zeros."""
    bits = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.detach().cpu().contiguous().view(bits), other.detach().cpu().contiguous().view(bits))


def small_model(
    dtype: str, device: str, shapes: tuple[tuple[int, int], ...], seed: int = 0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return linear layers and an AdamW with random moments, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes).to(kind).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for param in model.parameters():

        def drawn(like: Tensor = param) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(kind).to(device)

        with torch.no_grad():
            param.copy_(drawn())
        optimizer.state[param] = {"step": torch.tensor(3.0), "exp_avg": drawn(), "exp_avg_sq": drawn().abs()}
    return model, optimizer


class HostReads(TorchFunctionMode):
    """A counter of operations for which the host waits: values read into Python, and shapes that depend on values."""

    NAMES = frozenset(
        """item tolist cpu numpy nonzero masked_select unique equal allclose
        __int__ __float__ __bool__ __index__ __array__ __contains__""".split()  # noqa: SIM905
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_paused = False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, Tensor) and (index.dtype == torch.bool or (name == "__getitem__" and index.ndim == 0))
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if not self.is_paused and (name in self.NAMES or by_mask):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
