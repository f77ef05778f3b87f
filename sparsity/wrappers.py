"""Wrappers that hide a model's weights: what cannot be pruned right is refused before anything is pruned wrong."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments


def check_weights_are_in_reach(model: nn.Module, args: TrainingArguments | None = None) -> None:
    """A ValueError under FSDP1, which flattens parameters, and under DeepSpeed, which trains copies of its own."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "The model is wrapped in FSDP1, which flattens its parameters, so that linear weights cannot be told apart: "
            "set fsdp_version=2 in accelerate's config."
        )
    by_deepspeed = getattr(args, "deepspeed_plugin", None) is not None
    if by_deepspeed or any(hasattr(param, "ds_id") for param in model.parameters()):
        raise ValueError(
            "The model is trained by DeepSpeed, which updates partitioned copies of the weights, so that pruned ones would "
            "come back: train with FSDP2, DDP or one process."
        )
