"""Loading experts: a compact folder stores them one by one, and a model stacks them in one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from sparsity.compact.bitmask import expand_tensor
from sparsity.compact.contents import BITMASK, SCALES
from sparsity.compact.rounding import restore_stored


class ExpandExperts(ConversionOps):
    """The conversion of experts' bitmasks and values, rounded or not, to dense tensors, which the model's own operations stack.

    Args:
        stacking: The conversion by which transformers stacks dense experts.
    """

    def __init__(self, stacking: WeightConverter) -> None:
        self.stacking = stacking

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Return the dense matrix of each expert for each part of the stacked parameter."""
        param = kwargs["model"].get_parameter_or_buffer(kwargs["full_layer_name"])
        _, rows, columns = param.shape
        parts = [pattern for pattern in source_patterns if not pattern.endswith((BITMASK, SCALES))]
        shape = torch.Size((rows // len(parts), columns))
        dense = {}
        for pattern in parts:
            masks, scales = (iter(input_dict.get(pattern + part, ())) for part in (BITMASK, SCALES))
            dense[pattern] = [_expert(tensor, masks, scales, shape).to(param.dtype) for tensor in input_dict[pattern]]
        return dense


def _expert(stored: Tensor, masks: Iterator[Tensor], scales: Iterator[Tensor], shape: torch.Size) -> Tensor:
    """Return an expert's matrix; one that a bitmask would not make smaller is stored dense, without mask and scales."""
    if stored.is_floating_point():
        # Kept values are always a list.
        return stored if stored.dim() == 2 else expand_tensor(next(masks), stored, shape)
    mask = next(masks)
    return expand_tensor(mask, restore_stored(mask, stored, next(scales), tuple(shape)), shape)


def stacks(conversion: Any, name: str) -> bool:
    """Return whether a conversion stacks the expert `name` with others in one of the two known ways."""
    operations = [
        (type(operation), getattr(operation, "dim", None)) for operation in getattr(conversion, "operations", ())
    ]
    is_known = operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    # A copy is asked, because a conversion records the names that it was asked for.
    return is_known and deepcopy(conversion).rename_source_key(name)[1] is not None


def with_bitmasks(conversion: WeightConverter) -> WeightConverter:
    """Return a conversion that expands experts before it stacks them."""
    patterns = list(conversion.source_patterns)
    # The values come last, because their name is a prefix of the other parts' names.
    return WeightConverter(
        [*(pattern + part for part in (BITMASK, SCALES) for pattern in patterns), *patterns],
        list(conversion.target_patterns),
        [ExpandExperts(conversion), *conversion.operations],
    )


def stacking_of(conversion: Any) -> Any:
    """Return transformers' own conversion if `with_bitmasks` made this one, else the conversion itself."""
    first = next(iter(getattr(conversion, "operations", ())), None)
    return first.stacking if isinstance(first, ExpandExperts) else conversion
