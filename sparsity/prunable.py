"""Which parameters are pruned: the weight of every linear layer, lm_head included; never embeddings or norms."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from sparsity.pattern import NofM

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def prunable_parameters(
    model: nn.Module, include: Sequence[str] | None = None, requires_dense: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The prunable parameters by name, in the model's order.

    `include` and `requires_dense` are patterns over parameter names (`*` matches anything): the first names what is
    pruned instead of the weights of all linear layers, the second what stays dense. A weight that an embedding shares
    stays dense, with a warning, unless `include` names it. A pattern that matches no parameter is a ValueError.
    """
    parameters = {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
    for option, patterns in (("include", include or ()), ("requires_dense", requires_dense)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ValueError(
                    f"The pattern {pattern!r} in {option} matches no parameter: patterns are compared with names like "
                    f"{_an_example(parameters)!r}, * matches anything."
                )
    if include is None:
        chosen = linear_weights(model)
        _leave_tied_dense(model, chosen)
    else:
        chosen = {name: p for name, p in parameters.items() if any(fnmatchcase(name, pattern) for pattern in include)}
        if frozen := [name for name, param in chosen.items() if not param.requires_grad]:
            raise ValueError(f"{frozen[0]} is named in include but is frozen: train it, or name others.")
    unique: dict[int, str] = {}
    for name, param in chosen.items():
        if not any(fnmatchcase(name, pattern) for pattern in requires_dense) and param.requires_grad:
            unique.setdefault(id(param), name)
    if not unique:
        raise ValueError("No parameter of the model is prunable: it has no trainable linear layer that may be pruned.")
    return {name: chosen[name] for name in unique.values()}


def check_pattern(model: nn.Module, parameters: Mapping[str, Tensor], pattern: NofM) -> None:
    """A ValueError names a parameter whose input dimension the pattern cannot run along."""
    transposed = {f"{plain_name(name)}.weight" for name, module in model.named_modules() if _is_conv1d(module)}
    for name, param in parameters.items():
        if name in transposed:
            raise ValueError(
                f"pattern={pattern} runs along the inputs of a weight [out, in], and {name} is a Conv1D's, [in, out], whose "
                "inputs FSDP2 shares out: name it in requires_dense, or take pattern=unstructured."
            )
        pattern.check_shape(name, param.shape)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every linear layer by name; transformers' Conv1D is one."""
    return {
        f"{plain_name(name)}.weight".removeprefix("."): module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) or _is_conv1d(module)
    }


def own_linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers that are no embedding's, each once: what a model's linear parameters count."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, weight in linear_weights(model).items():
        if id(weight) not in embeddings:
            found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def plain_name(name: str) -> str:
    """The name without what torch.compile, DDP and checkpointing wrap around modules."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _leave_tied_dense(model: nn.Module, chosen: dict[str, Tensor]) -> None:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name in [name for name, param in chosen.items() if id(param) in embeddings]:
        del chosen[name]
        message = f"{name} shares its weight with an embedding and stays dense; name it in include to prune it."
        warnings.warn(message, stacklevel=2)


def _an_example(parameters: Mapping[str, Tensor]) -> str:
    return next((name for name in parameters if "proj" in name), next(iter(parameters), ""))
