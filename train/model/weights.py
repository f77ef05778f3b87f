"""Weights for a model built without any: it is sharded first, then its weights are drawn, and each rank keeps its rows.

A model is built as a skeleton: its buffers are computed, its parameters are on the meta device and take no memory. Once
it is placed or sharded, its weights are drawn unit by unit. A unit is a transformer block or another module with
its own parameters. Each unit is drawn whole on the CPU, with the distribution of `model.init` and a generator seeded by
(seed, unit name); then each rank copies its rows. So the weights are the same on any device and for any number of ranks,
and a rank's host memory holds one unit in addition to its shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparsity.shards import local_tensor
from sparsity.wrappers import fsdp2_groups
from train.checkpoints.contents import local_rows
from train.model.export import full_names
from train.model.parametrisation import INITS, fold_drawn_
from train.plan.architecture import block_names


def skeleton(build: Callable[[], Any]) -> Any:
    """Return the model that `build` makes, with its buffers computed and its parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = build()
    # `init_empty_weights` made a separate meta parameter for each name of a tied one.
    model.tie_weights()
    return model


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate memory on `device` for every parameter on the meta device, without values yet.

    The parameters become new objects, so create the optimizer afterwards. Tied parameters stay tied.
    """
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or not (param.is_meta or id(param) in new):
                continue
            if id(param) not in new:
                new[id(param)] = nn.Parameter(torch.empty_like(param, device=device), param.requires_grad)
            module._parameters[name] = new[id(param)]
    for module in model.modules():
        # FSDP2 notices its new parameters, and pads them, only when `_apply` is called, so its groups are told here.
        for group in fsdp2_groups(module):
            for param in group.fsdp_params:
                param.reset_sharded_param()
    _tell_empty_shards_apart(model)


@torch.no_grad()
def draw_weights(model: nn.Module, template: PreTrainedModel, seed: int, init: str = "transformers") -> None:
    """Fill `model`, sharded or not, with random weights that depend only on `seed`.

    Args:
        model: The model to fill; its parameters have memory.
        template: A skeleton of the same model.
        seed: Any integer.
        init: The distribution, one of `train.model.parametrisation.INITS`.

    Raises:
        ValueError: The model's `_init_weights` leaves a parameter without values.
    """
    wanted = full_names(model)
    units = list(_units(template))
    # One buffer for all units: allocating each by itself would fragment as much memory as the model takes.
    scratch = torch.empty(max(_unit_bytes(unit, recurse) for _, unit, _, recurse in units), dtype=torch.uint8)
    for name, unit, owner, recurse in units:
        prefix = f"{name}." if name else ""
        owned = {f"{prefix}{inner}" for inner, _ in unit.named_parameters(recurse=recurse)}
        if not owned & set(wanted):
            continue
        _materialise(unit, recurse, scratch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(seed, name))
            initialise(unit, owner, recurse, init)
        fold_drawn_(unit)
        for inner, full in unit.named_parameters(recurse=recurse):
            if (target := wanted.get(f"{prefix}{inner}")) is None:
                continue
            if full.sum().isnan():
                raise no_values(owner, f"{prefix}{inner}")
            start, stop = local_rows(target)
            local_tensor(target).copy_(full[start:stop])
        _discard(unit, recurse)


def shard_and_allocate(accelerator: Any, model: nn.Module) -> None:
    """Shard a skeleton by accelerate's FSDP2 and allocate its shards.

    accelerate's `prepare` would shard too late: it maps an optimizer's parameters by their memory addresses, which
    parameters on the meta device do not have. When it runs, it finds nothing left to do.

    Collective: every rank calls it.
    """
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    # Otherwise rank 0 would send its full parameters to all other ranks, but it has none.
    plugin.cpu_ram_efficient_loading = False
    # accelerate rejects a name in `_no_split_modules` that no module has, such as that of a part left out of the model.
    plugin.transformer_cls_names_to_wrap = sorted(block_names(model))
    if plugin.activation_checkpointing:
        plugin.set_auto_wrap_policy(model)
        fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False
    fsdp2_prepare_model(accelerator, model)
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    allocate(model, torch.device("cpu") if offloads else accelerator.device)


def _units(
    model: PreTrainedModel, name: str = "", module: nn.Module | None = None, owner: PreTrainedModel | None = None
) -> Iterator[tuple[str, nn.Module, PreTrainedModel, bool]]:
    """Yield each unit in order: (name, module, model whose `_init_weights` it needs, whether it includes submodules).

    Each member of a ModuleList, usually a transformer block, is a unit with everything in it: some models initialise a
    submodule by its position in the block.
    """
    module, owner = model if module is None else module, model if owner is None else owner
    if isinstance(module, PreTrainedModel):
        owner = module
    is_block = type(module).__name__ in (getattr(model, "_no_split_modules", None) or ())
    if is_block or not any(True for _ in module.children()):
        yield name, module, owner, True
        return
    for inner, child in module.named_children():
        path = f"{name}.{inner}" if name else inner
        if isinstance(module, nn.ModuleList):
            yield path, child, child if isinstance(child, PreTrainedModel) else owner, True
        else:
            yield from _units(model, path, child, owner)
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module, owner, False


def no_values(owner: PreTrainedModel, name: str) -> ValueError:
    """Return the error about a parameter that stays without values."""
    return ValueError(
        f"{type(owner).__name__}._init_weights gives {name} no values, so this model cannot start from random weights: set "
        "init_from."
    )


def initialise(module: nn.Module, owner: PreTrainedModel, recurse: bool, init: str) -> None:
    """Draw parameters in transformers' order: children first, each by the innermost PreTrainedModel around it.

    Args:
        module: The module.
        owner: The innermost PreTrainedModel around it.
        recurse: Whether to draw the parameters of submodules too.
        init: The distribution, one of `train.model.parametrisation.INITS`.
    """
    if recurse:
        for child in module.children():
            initialise(child, child if isinstance(child, PreTrainedModel) else owner, recurse, init)
    INITS[init](module, owner)


def _materialise(unit: nn.Module, recurse: bool, scratch: Tensor) -> None:
    """Place a unit's parameters in `scratch` [bytes], filled with NaN until they are drawn."""
    start = 0
    for module in unit.modules() if recurse else [unit]:
        for name, param in module._parameters.items():
            if param is not None:
                values = scratch[start : start + param.numel() * param.element_size()].view(param.dtype)
                module._parameters[name] = nn.Parameter(values.view(param.shape).fill_(float("nan")))
                start += _aligned_bytes(param)


def _unit_bytes(unit: nn.Module, recurse: bool) -> int:
    modules = unit.modules() if recurse else [unit]
    return sum(
        _aligned_bytes(param) for module in modules for param in module._parameters.values() if param is not None
    )


def _aligned_bytes(param: Tensor) -> int:
    """Return the bytes of a parameter, rounded up to a cache line of the CPU."""
    return -(-param.numel() * param.element_size() // 64) * 64


def _discard(unit: nn.Module, recurse: bool) -> None:
    """Put a unit's parameters back on the meta device."""
    for module in unit.modules() if recurse else [unit]:
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(param, device="meta"))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()) >> 1


def _tell_empty_shards_apart(model: nn.Module) -> None:
    """Give each shard without rows a distinct address: accelerate identifies an optimizer's parameters by address."""
    for number, param in enumerate(model.parameters()):
        local: Tensor | None = param._local_tensor if isinstance(param, DTensor) else None
        if local is not None and local.numel() == 0:
            local.data_ptr = partial(int, -1 - number)  # type: ignore[method-assign]
