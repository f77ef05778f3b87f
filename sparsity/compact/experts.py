"""Loading experts: a compact folder stores them one by one, and a model stacks them in one parameter."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from sparsity.compact.bitmask import expand_tensor
from sparsity.compact.contents import BITMASK


class ExpandExperts(ConversionOps):
    """The conversion of experts' bitmasks and values to dense tensors, which the model's own operations then stack.

    Args:
        stacking: The conversion by which transformers stacks dense experts.
    """

    def __init__(self, stacking: WeightConverter) -> None:
        self.stacking = stacking

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        _, rows, columns = kwargs["model"].get_parameter_or_buffer(kwargs["full_layer_name"]).shape
        parts = [pattern for pattern in source_patterns if not pattern.endswith(BITMASK)]
        shape = torch.Size((rows // len(parts), columns))
        dense = {}
        for pattern in parts:
            # An expert is stored as a dense matrix if a bitmask would not make it smaller; kept values are always a list.
            masks = iter(input_dict.get(pattern + BITMASK, ()))
            dense[pattern] = [
                tensor if tensor.dim() == 2 else expand_tensor(next(masks), tensor, shape)
                for tensor in input_dict[pattern]
            ]
        return dense


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
    # Bitmasks come first, because the name of the values is a prefix of the mask's name.
    return WeightConverter(
        [*(pattern + BITMASK for pattern in patterns), *patterns],
        list(conversion.target_patterns),
        [ExpandExperts(conversion), *conversion.operations],
    )


def stacking_of(conversion: Any) -> Any:
    """Return transformers' own conversion if `with_bitmasks` made this one, else the conversion itself."""
    first = next(iter(getattr(conversion, "operations", ())), None)
    return first.stacking if isinstance(first, ExpandExperts) else conversion
