"""Weights for a model that is built without any: sharded first, then drawn or read, each rank keeping only its rows.

A model is built as a skeleton: its buffers are computed, its parameters are on the meta device and take no memory. Once
it is placed or sharded, its weights are drawn unit by unit, a unit being a transformer block or another module with
parameters of its own. The unit is drawn whole, on the CPU, as `model.init` says and with a generator seeded
by (seed, unit name), and each rank copies its rows. So the weights are the same on any device and for any number of
ranks, and a rank's host memory holds one unit beside its shard.
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
from train.checkpoints.write import local_rows
from train.model.export import full_names
from train.model.parametrisation import INITS, fold_drawn_
from train.plan.architecture import block_names


def skeleton(build: Callable[[], Any]) -> Any:
    """Return the model that `build` makes, with computed buffers and with parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = build()
    # A tied parameter was moved to the meta device once for each of its names.
    model.tie_weights()
    return model


@torch.no_grad()
def allocate(model: nn.Module, device: torch.device) -> None:
    """Give every parameter that is on the meta device memory on `device`, with no values yet.

    The parameters become new objects, so an optimizer must be made afterwards. A tied parameter stays one.
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
        # FSDP2 takes note of its new parameters, and pads them, whenever `_apply` is called.
        for group in fsdp2_groups(module):
            for param in group.fsdp_params:
                param.reset_sharded_param()
    _tell_empty_shards_apart(model)


@torch.no_grad()
def draw_weights(model: nn.Module, template: PreTrainedModel, seed: int, init: str = "transformers") -> None:
    """Fill `model`, sharded or not, with random weights that follow from `seed` alone.

    Args:
        model: The model to fill; its parameters have memory.
        template: A skeleton of the same model.
        seed: Any integer.
        init: The distribution, one of `train.model.parametrisation.INITS`.

    Raises:
        ValueError: the model's `_init_weights` leaves a parameter without values.
    """
    wanted = full_names(model)
    units = list(_units(template))
    # One piece of memory for all units: many that come and go would leave holes as large as the model.
    scratch = torch.empty(max(_unit_bytes(unit, recurse) for _, unit, _, recurse in units), dtype=torch.uint8)
    for name, unit, owner, recurse in units:
        prefix = f"{name}." if name else ""
        owned = {f"{prefix}{inner}" for inner, _ in unit.named_parameters(recurse=recurse)}
        if not owned & set(wanted):
            continue
        _materialise(unit, recurse, scratch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed_of(seed, name))
            _initialise(unit, owner, recurse, init)
        fold_drawn_(unit)
        for inner, full in unit.named_parameters(recurse=recurse):
            if (target := wanted.get(f"{prefix}{inner}")) is None:
                continue
            if full.sum().isnan():
                raise ValueError(
                    f"{type(owner).__name__}._init_weights gives {prefix}{inner} no values, so that this model cannot "
                    "start from random weights: set init_from."
                )
            start, stop = local_rows(target)
            local_tensor(target).copy_(full[start:stop])
        _discard(unit, recurse)


def shard_and_allocate(accelerator: Any, model: nn.Module) -> None:
    """Shard a skeleton by accelerate's FSDP2 and give its shards memory. Collective.

    accelerate's `prepare` would do the first half later, and finds nothing left to do: it maps an optimizer's parameters
    by their addresses, which parameters on the meta device do not have.
    """
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    # Rank 0 would send every other rank its whole parameters, of which it has none.
    plugin.cpu_ram_efficient_loading = False
    # accelerate refuses a name of `_no_split_modules` that no module has, as those of the parts left out of a model.
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
    """(name, module, the model whose `_init_weights` it needs, whether its submodules belong to it), in order.

    The members of a list of modules, transformer blocks as a rule, are units with all that is in them: some models
    initialise a submodule by its place in the block.
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


def _initialise(module: nn.Module, owner: PreTrainedModel, recurse: bool, init: str) -> None:
    """Draw in transformers' order: children first, each by the innermost model around it."""
    if recurse:
        for child in module.children():
            _initialise(child, child if isinstance(child, PreTrainedModel) else owner, recurse, init)
    INITS[init](module, owner)


def _materialise(unit: nn.Module, recurse: bool, scratch: Tensor) -> None:
    """Put a unit's parameters into `scratch` [bytes], as NaN until they are drawn."""
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
    """The bytes of a parameter, up to the next line of the CPU's cache."""
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
    """Give shards without rows an address of their own: accelerate tells an optimizer's parameters apart by it."""
    for number, param in enumerate(model.parameters()):
        local: Tensor | None = param._local_tensor if isinstance(param, DTensor) else None
        if local is not None and local.numel() == 0:
            local.data_ptr = partial(int, -1 - number)  # type: ignore[method-assign]
