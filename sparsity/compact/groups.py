"""Projections of the same input as one matrix: a decoding step then has one launch for q, k and v, and one for gate and up.

A model calls its projections one after the other. The first call multiplies by all of them and leaves the other results on a
shelf, from which the calls after it take theirs. A result is used only if its input is the same tensor, unchanged since, and it
is taken once, so that any order of calls gives what separate layers give.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.compact.linear import SparseLinear, replace_
from sparsity.compact.packed import Packed, concatenate, rows_of, unpack
from sparsity.compact.product import Tiles, most_vectors, multiply

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections of one module that get the same input in models of transformers."""
MOST_UNUSED = 4
"""So many products in a row whose other results nobody took show that the inputs differ, as in cross-attention."""


class Shelf:
    """The results of a group's last product that have not been taken yet, and their input. A copied shelf is empty."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, int, dict[int, Tensor]] | None = None
        self.num_unused = 0

    def __reduce__(self) -> tuple[type[Shelf], tuple[()]]:
        """Leave out the tensors, because deepcopy refuses results of autograd and a file should not hold activations."""
        return Shelf, ()


class SparseGroup(SparseLinear):
    """The rows of several layers as one matrix.

    Args:
        layers: Layers of the same input, all with a bias or none; `can_group` must hold for them.
    """

    def __init__(self, layers: list[SparseLinear]) -> None:
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers if layer.bias is not None])
        super().__init__(concatenate([layer.packed for layer in layers]), bias, layers[0].coded_dtype)
        self.edges = (0, *accumulate(layer.out_features for layer in layers))
        self.part_tiles = [Tiles.of(self.rows(number)) for number in range(len(layers))]
        self.shelf = Shelf()
        self.register_load_state_dict_pre_hook(_forget)

    def rows(self, number: int) -> Packed:
        """Return the rows of one layer, as views."""
        return rows_of(self.packed, self.edges[number], self.edges[number + 1])

    def part_bias(self, number: int) -> Tensor | None:
        """Return the bias of one layer, as a view."""
        return None if self.bias is None else self.bias[self.edges[number] : self.edges[number + 1]]

    def part(self, number: int, x: Tensor) -> Tensor:
        """Return the product of x and one layer, and put those of the other layers on the shelf if there are few vectors."""
        version = _version(x)
        is_few = x.numel() <= most_vectors(x) * self.in_features and not (torch.is_grad_enabled() and x.requires_grad)
        if version is None or not is_few:
            return self._alone(number, x)
        held = self.shelf.held
        if held is not None and held[0] is x and held[1] == version and number in held[2]:
            self.shelf.num_unused = 0
            found = held[2].pop(number)
            if not held[2]:
                self.shelf.held = None
            return found
        if held is not None and len(held[2]) + 2 == len(self.edges):
            self.shelf.num_unused += 1
            self.shelf.held = None
        if self.shelf.num_unused >= MOST_UNUSED:
            return self._alone(number, x)
        parts = self(x).split([stop - start for start, stop in pairwise(self.edges)], -1)
        # Contiguous, because a model may view a result in any shape; of a single vector, no copy is made. With autograd, a
        # view of several results could not be written to.
        results = [
            part.clone(memory_format=torch.contiguous_format) if torch.is_grad_enabled() else part.contiguous()
            for part in parts
        ]
        self.shelf.held = (x, version, {other: part for other, part in enumerate(results) if other != number})
        return results[number]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseGroup:
        """Convert or move the matrix."""
        _forget(self)
        super()._apply(fn, recurse)
        return self

    def _alone(self, number: int, x: Tensor) -> Tensor:
        return multiply(x, self.rows(number), self.part_bias(number), self.part_tiles[number])


class GroupedLinear(nn.Module):
    """One layer of a `SparseGroup`. It holds nothing itself; the group is a submodule of the group's first layer."""

    group: SparseGroup

    def __init__(self, group: SparseGroup, number: int) -> None:
        super().__init__()
        self.number = number
        self.in_features, self.out_features = group.in_features, group.edges[number + 1] - group.edges[number]
        if number == 0:
            self.group = group
        else:
            # Not a submodule, so that the group's buffers are listed, moved and converted once.
            self.__dict__["group"] = group

    @property
    def weight(self) -> Tensor:
        """The dense matrix, unpacked at each access."""
        words = self.group.part_tiles[self.number].words
        dense = unpack(self.group.rows(self.number), words=(words[0], words[-1]))
        return dense if self.group.coded_dtype is None else dense.to(self.group.coded_dtype)

    @property
    def bias(self) -> Tensor | None:
        """This layer's part of the group's bias."""
        return self.group.part_bias(self.number)

    def forward(self, x: Tensor) -> Tensor:
        """Return this layer's product with x; the group may compute those of its other layers along with it."""
        return self.group.part(self.number, x)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def group_linears_(model: nn.Module) -> list[tuple[str, ...]]:
    """Make one matrix of projections that get the same input; return their names.

    Projections are known by their names (`GROUPS`). A group of which a layer is not a `SparseLinear`, or which `can_group`
    refuses, stays as it is.
    """
    grouped = []
    for parent_name, parent in list(model.named_modules()):
        for names in GROUPS:
            layers = [layer for layer in (getattr(parent, name, None) for name in names) if type(layer) is SparseLinear]
            if len(layers) < len(names) or not can_group(layers):
                continue
            group = SparseGroup(layers)
            full_names = tuple(f"{parent_name}.{name}".lstrip(".") for name in names)
            for number, name in enumerate(full_names):
                replace_(model, name, GroupedLinear(group, number))
            grouped.append(full_names)
    return grouped


def can_group(layers: list[SparseLinear]) -> bool:
    """Return whether layers have the same input, type and device, and all have a bias or none."""
    kinds = {
        (layer.in_features, layer.values.dtype, layer.values.device, layer.coded_dtype, layer.bias is None)
        for layer in layers
    }
    return len(kinds) == 1


def _forget(group: SparseGroup, *_: Any) -> None:
    """Drop the results that wait, because the matrix changes."""
    group.shelf.held = None


def _version(x: Tensor) -> int | None:
    """Return a number that changes when x is written to; None for a tensor of inference_mode, which has none.

    Compiled code has no such number: a compiled model must not write to x between its projections.
    """
    if torch.compiler.is_compiling():
        return 0
    return None if x.is_inference() else x._version
