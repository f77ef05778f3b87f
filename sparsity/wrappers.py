"""Checks of a Trainer: no wrapper hides the model's weights, and no event is lost at the end of the run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, FullyShardedDataParallel
from torch.torch_version import TorchVersion
from transformers import TrainingArguments

OFFLOADS_BEFORE_HOOKS = "2.13"
"""The first torch that finishes copying an offloaded gradient before it calls the parameter's hooks (2.12.1 does not)."""


def check_weights_are_in_reach(model: nn.Module, args: TrainingArguments | None = None) -> None:
    """Raise a ValueError if a wrapper would bring pruned weights back.

    Args:
        model: The prepared model.
        args: The Trainer's arguments, which say whether DeepSpeed is used.

    Raises:
        ValueError: The model is under FSDP1, which flattens parameters; under DeepSpeed, which trains its own copies; or
            FSDP2 offloads to the CPU with a torch that still copies gradients there while they are masked.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "The model is wrapped in FSDP1, which flattens its parameters, so linear weights cannot be recognized: set "
            "fsdp_version=2 in accelerate's config."
        )
    by_deepspeed = getattr(args, "deepspeed_plugin", None) is not None
    if by_deepspeed or any(hasattr(param, "ds_id") for param in model.parameters()):
        raise ValueError(
            "The model is trained by DeepSpeed, which updates partitioned copies of the weights, so pruned ones would "
            "come back: train with FSDP2, DDP or one process."
        )
    if offloads_through_pinned_memory(model) and TorchVersion(torch.__version__) < OFFLOADS_BEFORE_HOOKS:
        raise ValueError(
            f"FSDP2 offloads parameters to the CPU, and torch {torch.__version__} still copies a gradient there while it "
            "is masked, so pruned weights would come back: install torch 2.13, or set fsdp_offload_params: false."
        )


def offloads_through_pinned_memory(model: nn.Module) -> bool:
    """Return whether FSDP2 keeps parameters in pinned CPU memory, to which it copies gradients without waiting."""
    policies = [group.offload_policy for module in model.modules() for group in fsdp2_groups(module)]
    return any(isinstance(policy, CPUOffloadPolicy) and policy.pin_memory for policy in policies)


def fsdp2_groups(module: nn.Module) -> list[Any]:
    """Return FSDP2's parameter groups of this module: torch 2.11 holds one or none, torch 2.13 and later a list."""
    if not isinstance(module, FSDPModule):
        return []
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [group for group in [state._fsdp_param_group] if group is not None]


def check_run(events: Collection[int], args: TrainingArguments, num_steps: int) -> None:
    """Raise a ValueError if the run ends before the last event, or would then load weights from before it."""
    if events and max(events) > num_steps - 1:
        raise ValueError(
            f"The prune window ends at step {max(events)}, outside a run of {num_steps} steps: end the "
            "window earlier or train longer."
        )
    if events and args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True would bring back the weights of a checkpoint before the last prune event: "
            "set it to False and load the checkpoint you want yourself."
        )
