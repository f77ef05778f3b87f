"""Support for compact folders in transformers: a quantizer that expands masks and values into dense parameters.

transformers loads tensor by tensor as usual, with its `device_map` and `dtype`. The result is a plain model, and
`save_pretrained` writes a plain folder. With `CompactWeights(dequantize=False)`, sparse linear layers are afterwards replaced
by `SparseLinear` one by one, for inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsity.compact.bitmask import expand_tensor
from sparsity.compact.contents import BITMASK, METHOD, SCALES, SUFFIXES, Stored, check_version
from sparsity.compact.experts import stacking_of, stacks, with_bitmasks
from sparsity.compact.files import check_file
from sparsity.compact.replacement import ROW_SCALES, sparse_linears_
from sparsity.compact.rounding import group_of, restore_stored


@register_quantization_config(METHOD)
class CompactWeights(QuantizationConfigMixin):
    """The `quantization_config` in config.json of a compact folder, or an argument of `from_pretrained`.

    Args:
        version: The format's version.
        quant_method: The format's name.
        dequantize: Whether the loaded model is dense. If False, layers stay sparse in memory, for inference; such a model
            cannot be saved.
        group: Whether sparse projections of the same input (q, k and v; gate and up) become one matrix.
    """

    dequantize = True
    """If True, transformers drops the quantization once the weights are loaded."""
    group = True

    def __init__(
        self, version: Any = 1, quant_method: Any = METHOD, dequantize: bool = True, group: bool = True, **others: Any
    ) -> None:
        check_version(version, "The model's quantization_config")
        if others:
            raise ValueError(f"quantization_config has the key {next(iter(others))}, which {METHOD} does not know.")
        self.quant_method = quant_method
        self.version = version
        # Attributes of the instance only if False, because to_dict writes instance attributes to config.json.
        if not dequantize:
            self.dequantize = False
        if not group:
            self.group = False

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the settings of an argument of `from_pretrained` that override the folder's config."""
        return {"dequantize": self.dequantize, "group": self.group}


# transformers asks only these classes for their loading attributes.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, CompactWeights)  # type: ignore[assignment]


@register_quantizer(METHOD)
class CompactLoader(HfQuantizer):
    """The quantizer: checks the files before loading, then gives transformers the operation that expands a tensor."""

    quantization_config: CompactWeights
    requires_calibration = True
    """Weights are made compact by `compact_folder`, not during loading."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.sparse: list[Stored] = []
        self.dtypes: dict[str, torch.dtype] = {}

    def is_serializable(self) -> bool:
        """True if transformers may save the model, which must be loaded dense for that."""
        return bool(self.quantization_config.dequantize)

    @property
    def is_trainable(self) -> bool:
        """True if the model can be trained, which must be loaded dense for that."""
        return bool(self.quantization_config.dequantize)

    @property
    def is_compileable(self) -> bool:
        """Let `generate` compile a decoding step with a static cache: sparse layers are operators of torch."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Raise a ValueError if a file is damaged or has other shapes than the model."""
        if not checkpoint_files:
            raise ValueError("A compact model is loaded from its folder: give from_pretrained that, and no state_dict.")
        expected = model.state_dict()
        # A model with its own dtype plan keeps some weights in float32.
        self.dtypes = {} if model._get_dtype_plan(dtype) else {name: p.dtype for name, p in model.named_parameters()}
        names: dict[str, str] = {}
        for file in checkpoint_files:
            for tensor in check_file(Path(file)):
                if names.setdefault(tensor.name, file) != file:
                    raise ValueError(f"{tensor.name} is in {names[tensor.name]} and in {file}: copy the folder again.")
                _check_shape(tensor, expected, model.base_model_prefix)
                if tensor.bitmask is not None:
                    self.sparse.append(tensor)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Return the model's conversions with those that expand sparse tensors."""
        names = [tensor.name for tensor in self.sparse]
        renamed = {name: _renamed(name, deepcopy(list(weight_conversions))) for name in names}
        stacked = {name for name in renamed.values() if any(stacks(c, name) for c in weight_conversions)}
        expanding = [
            with_bitmasks(conversion) if any(stacks(conversion, name) for name in stacked) else conversion
            for conversion in weight_conversions
        ]
        left = [name for name, new in renamed.items() if new not in stacked]
        return [*expanding, *expansions(left, weight_conversions, not self.quantization_config.dequantize)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Keep the type of codes and scales, so that values are rounded to the model's type only once."""
        is_ours = _expands(converter) or stacking_of(converter) is not converter
        is_rounded = is_ours and any(tensor.scales is not None for tensor in self.sparse)
        return None if is_rounded else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # Restore the plain conversions: save_pretrained would otherwise try to undo ours.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [stacking_of(conversion) for conversion in used if not _expands(conversion)]
        # transformers 5.17 leaves the file's type if a base model's names differ from the file's.
        for name, param in model.named_parameters():
            if param.dtype != self.dtypes.get(name, param.dtype) and param.device.type != "meta":
                param.data = param.data.to(self.dtypes[name])
        if not self.quantization_config.dequantize:
            sparse_linears_(model, group=self.quantization_config.group)


class ExpandBitmask(ConversionOps):
    """The conversion of a bitmask with its kept values, or with their codes and scales, to the dense tensor.

    Args:
        keep_scales: Whether to leave scales of rows on the module for `sparse_linears_`, which then restores the codes.
    """

    def __init__(self, keep_scales: bool = False) -> None:
        self.keep_scales = keep_scales

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Return the dense tensor by its name; the error for damaged parts names it."""
        name, scales = kwargs["full_layer_name"], None
        bitmask, values = (_only(input_dict.get(pattern), name) for pattern in (_part(BITMASK), source_patterns[-1]))
        if _part(SCALES) in input_dict:
            scales = _only(input_dict[_part(SCALES)], name)
        param = kwargs["model"].get_parameter_or_buffer(name)
        try:
            if scales is not None:
                if self.keep_scales and not group_of(values):
                    kwargs["model"].get_submodule(name.rpartition(".")[0]).__dict__[ROW_SCALES] = scales
                values = restore_stored(bitmask, values, scales, tuple(param.shape))
            return {name: expand_tensor(bitmask, values, param.shape).to(param.dtype)}
        except ValueError as error:
            raise ValueError(
                f"{name} cannot be expanded ({error}): a compact model cannot be sharded while it is loaded, so "
                "expand its folder first where this is a parallel plan."
            ) from error


def expansions(sparse: Sequence[str], conversions: Iterable[Any], keep_scales: bool = False) -> list[WeightConverter]:
    """Return the conversion that collects the parts of every sparse tensor under the tensor's name.

    Args:
        sparse: Names of the sparse tensors in the files.
        conversions: The model's own conversions.
        keep_scales: As for `ExpandBitmask`.

    Raises:
        ValueError: The model's conversions merge or split a sparse tensor.
    """
    if not sparse:
        return []
    conversions = deepcopy(list(conversions))
    names = [_renamed(name, conversions) for name in sparse]
    for conversion in conversions:
        if isinstance(conversion, WeightConverter):
            for name in names:
                if conversion.rename_source_key(name)[1] is not None:
                    raise ValueError(
                        f"{name} is merged or split while it is loaded, which compact tensors cannot be: expand the folder "
                        "with `python -m eval.compact model=DIR out=OUT expand=true` and load that."
                    )
    # The pattern matches only at these names, so that transformers handles dense tensors itself.
    values = f"^(?=(?:{'|'.join(map(re.escape, names))})$)"
    return [WeightConverter([*map(_part, SUFFIXES), values], "", [ExpandBitmask(keep_scales)])]


def _part(ending: str) -> str:
    """Return a pattern for stored names with this ending."""
    return re.escape(ending) + "$"


def _renamed(name: str, conversions: Iterable[Any]) -> str:
    for conversion in conversions:
        if isinstance(conversion, WeightRenaming):
            name = conversion.rename_source_key(name)[0]
    return name


def _expands(conversion: Any) -> bool:
    return any(isinstance(operation, ExpandBitmask) for operation in getattr(conversion, "operations", ()))


def _only(tensors: Any, name: str) -> Tensor:
    if isinstance(tensors, list) and len(tensors) == 1:
        tensors = tensors[0]
    if not isinstance(tensors, torch.Tensor):
        raise ValueError(f"{name} has not one bitmask and one list of values: copy its folder again.")
    return tensors


def _check_shape(tensor: Stored, expected: dict[str, Tensor], prefix: str) -> None:
    """Raise a ValueError if the model has `tensor` in another shape, under its own name or that of the base model."""
    for name in (tensor.name, f"{prefix}.{tensor.name}", tensor.name.removeprefix(f"{prefix}.")):
        if name in expected and tuple(expected[name].shape) != tensor.shape:
            raise ValueError(
                f"{tensor.name} is {tensor.shape} in the file and {tuple(expected[name].shape)} in the model: config.json "
                "is of another model."
            )
