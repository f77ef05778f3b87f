"""The replacement of a model's sparse linear layers by layers that stay sparse in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsity.compact.groups import group_linears_
from sparsity.compact.linear import SparseLinear, replace_, wait_until_written
from sparsity.devices import kernels_for

MOST_DENSITY, MOST_DENSITY_EARLY, MOST_DENSITY_ON_CPU = 0.35, 0.5, 0.25
"""Denser layers are not replaced; see `most_density_for`."""
_ALIGNMENT = 256


def most_density_for(device: torch.device) -> float:
    """Return the largest density at which measurements favour the sparse product.

    On an H100, where kernels start early, the sparse product is 1.3 and 1.4 times as fast as a dense one at 0.5. An H200
    without early starts took 0.6 to 0.8 of cuBLAS's time at 0.3 and up to 1.3 at 0.5. On a CPU the sparse product is 1.06 to
    1.2 times as fast as a dense one at 0.25, and 0.9 to 1.0 times at 0.3.
    """
    if device.type == "cpu":
        return MOST_DENSITY_ON_CPU
    if device.type != "cuda" or kernels_for(device) is None:
        return MOST_DENSITY
    from sparsity.compact.spmv import can_start_early

    return MOST_DENSITY_EARLY if can_start_early(device) else MOST_DENSITY


def sparse_linears_(model: nn.Module, most_density: float | None = None, group: bool = True) -> list[str]:
    """Replace each sparse linear layer by a `SparseLinear`, one at a time; return the layers' names.

    Layers that share their weight with another module, subclasses of nn.Linear, and layers denser than `most_density` are
    not replaced.

    Args:
        model: A module with its weights.
        most_density: The largest share of kept weights at which a layer is replaced; None: `most_density_for` its device.
        group: Whether projections of the same input become one matrix (`sparsity.compact.groups`).

    Raises:
        ValueError: The model itself is a linear layer.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                owners[id(param)] = owners.get(id(param), 0) + 1
    replaced = []
    for name, module in list(model.named_modules()):
        scales = module.__dict__.pop(ROW_SCALES, None)
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1 or module.weight.device.type == "meta":
            continue
        most = most_density_for(module.weight.device) if most_density is None else most_density
        if torch.count_nonzero(module.weight).item() > most * module.weight.numel():
            continue
        if not name:
            raise ValueError(
                "the model is itself a linear layer: use SparseLinear.from_dense(layer.weight, layer.bias)"
            )
        replace_(model, name, SparseLinear.from_dense(module.weight, module.bias, scales))
        replaced.append(name)
    if group:
        group_linears_(model)
    share_storage_([layer for layer in model.modules() if isinstance(layer, SparseLinear) and layer.values.is_cuda])
    return replaced


ROW_SCALES = "_compact_row_scales"
"""The attribute in which loading leaves a rounded layer's scales for `sparse_linears_`."""


def share_storage_(layers: Sequence[SparseLinear]) -> None:
    """Move the buffers of all layers into one storage for each device.

    An allocator rounds up the size of each tensor: on a GPU by half a megabyte, which adds up to 13 MB for a 1B model.
    """
    by_device: dict[torch.device, list[tuple[SparseLinear, str, Tensor]]] = {}
    for layer in layers:
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.numel():
                by_device.setdefault(buffer.device, []).append((layer, name, buffer))
    for device, buffers in by_device.items():
        sizes = [-(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT for _, _, buffer in buffers]
        storage = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for part, (layer, name, buffer) in zip(storage.split(sizes), buffers, strict=True):
            found = part[: buffer.nbytes].view(buffer.dtype).view(buffer.shape)
            layer._buffers[name] = found.copy_(buffer)
        wait_until_written(storage)
