"""Float8 matrix products (`trainer.fp8=true`): torchao's tensorwise float8 linears replace those of the decoder.

Only the products are in float8. Weights remain float32 parameters with the same names, so that masks, moments,
checkpoints and the export are unaffected. lm_head stays in bfloat16, because the loss needs precise outputs. FSDP2 still
gathers weights in bfloat16.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn

from conf.schema import Config
from train.plan.run import RunPlan

MULTIPLE = 16
"""Every dimension of a float8 product must be a multiple of this, by the rule of torch._scaled_mm."""
MIN_CAPABILITY = (8, 9)


def check_fp8(config: Config, plan: RunPlan, device: torch.device, is_main: bool = True) -> None:
    """Check that float8 is available, and warn on stderr if it will not make the run faster.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        device: The device that trains.
        is_main: Whether this rank prints the warnings.

    Raises:
        ValueError: Something that float8 needs is missing; the message names it.
    """
    if not config.trainer.fp8:
        return
    if device.type != "cuda":
        raise ValueError(
            "trainer.fp8=true needs a GPU with float8 units and this machine has no GPU: set trainer.fp8=false."
        )
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"trainer.fp8=true needs a GPU of compute capability 8.9 or higher and {name} has "
            f"{capability[0]}.{capability[1]}: take an H100, H200, B200, L40S or RTX 4090, or set trainer.fp8=false."
        )
    float8_module()
    if (tokens := plan.micro_batch_size * plan.sequence_length) % MULTIPLE:
        raise ValueError(
            f"trainer.fp8=true needs micro-batches of a multiple of {MULTIPLE} tokens and "
            f"trainer.per_device_train_batch_size={plan.micro_batch_size} x data.sequence_length={plan.sequence_length} is "
            f"{tokens}: choose another micro-batch or length."
        )
    if is_main and not config.trainer.torch_compile:
        print(
            "warning: trainer.fp8=true without trainer.torch_compile=true is slower than bf16: the casts to float8 are "
            "kernels of their own then.",
            file=sys.stderr,
            flush=True,
        )


def float8_module() -> Any:
    """Return `torchao.float8`.

    Raises:
        ValueError: It is not installed or does not fit torch; the message names the extra that installs it.
    """
    try:
        return import_module("torchao.float8")
    except ImportError as error:
        raise ValueError(
            f"trainer.fp8=true needs torchao and it cannot be imported ({error}): pip install 'sparsellm[fp8]', or set "
            "trainer.fp8=false."
        ) from None


def convert_to_fp8(model: nn.Module, emulate: bool = False) -> list[str]:
    """Replace the linear layers of `model`, in place, by float8 ones with the same parameters.

    Args:
        model: A model whose `get_output_embeddings` returns its output layer.
        emulate: Whether to compute in float32 with operands rounded to float8, which works on any device.

    Returns:
        The names of the replaced layers: all but the output layer and those with a dimension that is no multiple of
            16.

    Raises:
        ValueError: No layer can be replaced.
    """
    float8 = float8_module()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and has_fp8_shape(module)
    ]
    if not chosen:
        raise ValueError(
            f"trainer.fp8=true finds no linear layer whose inputs and outputs are multiples of {MULTIPLE}: choose another "
            "model.hidden_size, or set trainer.fp8=false."
        )
    names = set(chosen)
    float8.convert_to_float8_training(
        model,
        config=float8.Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda module, name: name in names,
    )
    return chosen


def has_fp8_shape(linear: nn.Linear) -> bool:
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
