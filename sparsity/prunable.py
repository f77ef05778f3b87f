"""The choice of parameters to prune: the weights of linear layers and experts, never embeddings or norms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sparsity.arguments import check_patterns
from sparsity.notices import warn_on_rank_0
from sparsity.pattern import Pattern

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
_EXPERT_PATH, _EXPERT_CLASS = re.compile(r"expert|(?<![a-z])moe(?![a-z])"), re.compile("Expert|MoE|Moe")
_NO_MATRIX = re.compile("bias|embed|norm|scale")
_OWN_RULES = re.compile("embed|norm|conv", re.IGNORECASE)


def prunable_parameters(
    model: nn.Module, include: Sequence[str] | None = None, requires_dense: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the prunable parameters by name, in the model's order.

    A weight shared with an embedding stays dense, with a warning, unless `include` names it.

    Args:
        model: Any module.
        include: Patterns of parameter names (`*` matches anything) to prune instead of all `linear_weights`.
        requires_dense: Patterns of the names of parameters that stay dense.

    Raises:
        ValueError: A pattern matches no parameter, `include` names a frozen one, a chosen weight is computed from other
            parameters (weight_norm, torch.nn.utils.prune), or nothing is left to prune.
    """
    check_patterns("requires_dense", requires_dense)
    if include is not None:
        check_patterns("include", include)
    parameters = {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
    linear = linear_weights(model)
    computed = {name: weight for name, weight in linear.items() if name not in parameters}
    for option, patterns in (("include", include or ()), ("requires_dense", requires_dense)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in (*parameters, *computed)):
                raise ValueError(
                    f"The pattern {pattern!r} in {option} matches no parameter: patterns are compared with names like "
                    f"{_an_example(parameters)!r}, * matches anything."
                )
    if include is None:
        chosen = dict(linear)
        _leave_tied_dense(model, chosen)
    else:
        chosen = {name: p for name, p in (parameters | computed).items() if matches(name, include)}
        if frozen := [name for name, param in chosen.items() if not param.requires_grad and name not in computed]:
            raise ValueError(f"{frozen[0]} is named in include but is frozen: train it, or name others.")
    unique: dict[int, str] = {}
    for name, param in chosen.items():
        # With the old spectral_norm, `weight` does not require a gradient before the first forward pass.
        is_trained = param.requires_grad or (name in computed and parameters.get(f"{name}_orig", param).requires_grad)
        if not matches(name, requires_dense) and is_trained:
            unique.setdefault(id(param), name)
    for name in unique.values():
        if name in computed:
            raise ValueError(
                f"{name} is computed from other parameters (weight_norm, torch.nn.utils.prune or another parametrization), "
                "so its zeros would not stay: make it a plain weight with "
                "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove or "
                "torch.nn.utils.remove_weight_norm, or name it in requires_dense."
            )
    if not unique:
        raise ValueError("No parameter of the model is prunable: it has no trainable linear layer that may be pruned.")
    return {name: chosen[name] for name in unique.values()}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_pattern(model: nn.Module, parameters: Mapping[str, Tensor], pattern: Pattern) -> None:
    """Raise a ValueError if the pattern cannot run along the input dimension of a parameter."""
    check_inputs_are_last(model, parameters, f"pattern={pattern} runs", "use pattern=unstructured")
    for name, param in parameters.items():
        pattern.check_shape(name, param.shape)


def check_inputs_are_last(model: nn.Module, parameters: Mapping[str, Tensor], words: str, remedy: str) -> None:
    """Raise a ValueError if a parameter is not known to be [out, in] or [expert, out, in].

    Args:
        model: Any module.
        parameters: Some of its parameters by name.
        words: The choice that needs this, with its verb, for the error.
        remedy: What else to choose.
    """
    for path, module in model.named_modules():
        for own in module._parameters:
            name = _joined(path, own)
            if name not in parameters:
                continue
            if _is_conv1d(module):
                raise ValueError(
                    f"{words} along the inputs of a weight [out, in], and {name} is a Conv1D's, [in, out], "
                    f"whose inputs FSDP2 shards: name it in requires_dense, or {remedy}."
                )
            if parameters[name].dim() == 3 and getattr(module, "is_transposed", None) is not False:
                raise ValueError(
                    f"{words} along the inputs of experts [expert, out, in], but nothing says that {name} "
                    f"is stored that way (is_transposed=False): name it in requires_dense, or {remedy}."
                )


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every weight of a linear layer or of experts by name.

    - The `weight` of each nn.Linear and of each Conv1D of transformers.
    - In modules that are not torch's own layers, embeddings, norms or convolutions: parameters of 2 or 3 dimensions whose
      names end in weight or proj (routers, other libraries' linear layers, stacked linear layers).
    - In experts: all parameters of 2 or 3 dimensions except biases and scales.
    """
    return {
        _joined(path, own): weight
        for path, module in model.named_modules(remove_duplicate=False)
        for own, weight in _own_matrices(path, module)
    }


def _own_matrices(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        yield "weight", weight
    elif not _has_own_rules(module):
        is_expert = _EXPERT_PATH.search(path.lower()) or _EXPERT_CLASS.search(type(module).__name__)
        for own in (*module._parameters, *_computed_names(module)):
            tensor = getattr(module, own)
            is_weight = own.endswith(("weight", "proj")) or (is_expert and not _NO_MATRIX.search(own.lower()))
            if is_weight and is_matrix(tensor) and tensor.dim() <= 3:
                yield own, tensor


def _has_own_rules(module: nn.Module) -> bool:
    """Return whether a module is a torch.nn layer that is not linear, or another library's embedding, norm or convolution."""
    of_torch = (cls.__module__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules."))
    containers = ("torch.nn.modules.module", "torch.nn.modules.container")
    return any(home not in containers for home in of_torch) or bool(_OWN_RULES.search(type(module).__name__))


def _computed_names(module: nn.Module) -> list[str]:
    """Return the names of tensors that parametrizations or torch.nn.utils.prune compute from parameters."""
    old_style = [own.removesuffix("_orig") for own in module._parameters if own.endswith("_orig")]
    return [*getattr(module, "parametrizations", ()), *(own for own in old_style if hasattr(module, own))]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__.removeprefix("FSDP") == "Conv1D"


def is_matrix(tensor: Tensor | None) -> bool:
    """Return whether a floating-point tensor has at least two dimensions larger than 1."""
    return tensor is not None and tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) > 1


def own_linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the `linear_weights` that no embedding shares, each once: a model's linear parameters."""
    embeddings = _embedding_ids(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for name, weight in linear_weights(model).items():
        if id(weight) not in embeddings:
            found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def plain_name(name: str) -> str:
    """Return the name without the parts that torch.compile, DDP and checkpointing add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def left_out(model: nn.Module, chosen: Mapping[str, Tensor], requires_dense: Sequence[str]) -> list[str]:
    """Return the names of trained matrices that no rule prunes: attention's in_proj_weight, kernels, unknown parameters.

    Embeddings, weights shared with them, norms, and parameters that `requires_dense` names are not included.
    """
    known = {id(param) for param in chosen.values()} | _embedding_ids(model)
    names = []
    for path, module in model.named_modules():
        if re.search("embed|norm", type(module).__name__, re.IGNORECASE):
            continue
        for own, param in module._parameters.items():
            name = _joined(path, own)
            if param is None or id(param) in known or not param.requires_grad or not is_matrix(param):
                continue
            if not re.search("bias|embed|norm", own.lower()) and not matches(name, requires_dense):
                names.append(name)
    return names


def _leave_tied_dense(model: nn.Module, chosen: dict[str, Tensor]) -> None:
    embeddings = _embedding_ids(model)
    for name in [name for name, param in chosen.items() if id(param) in embeddings]:
        del chosen[name]
        warn_on_rank_0(f"{name} shares its weight with an embedding and stays dense; name it in include to prune it.")


def _embedding_ids(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _joined(path: str, own: str) -> str:
    return f"{plain_name(path)}.{own}".removeprefix(".")


def _an_example(parameters: Mapping[str, Tensor]) -> str:
    return next((name for name in parameters if "proj" in name), next(iter(parameters), ""))
