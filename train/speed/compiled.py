"""torch.compile of single blocks and of the loss."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel, TrainingArguments

WITHOUT_CUDA_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs"}
"""The modes replaced by ones without CUDA graphs. Blocks share one compiled graph; replayed as a CUDA graph, it would
overwrite a block's output with that of the next block."""


def compile_by_blocks(model: PreTrainedModel, arguments: TrainingArguments) -> None:
    """Make accelerate compile each block by itself, and compile the loss, if `arguments` ask for torch.compile.

    Blocks are alike, so one graph serves all of them. FSDP2's hooks run between the graphs; if the model were compiled as
    a whole, they would break its graph into pieces. The loss, which converts the logits to float32, becomes one pass over
    them. Liger's kernel, which never holds all logits, is not compiled. max-autotune tunes kernels without CUDA graphs.

    Args:
        model: The run's model.
        arguments: The run's arguments; a compile mode with CUDA graphs is replaced.

    Raises:
        ValueError: torch.compile does not accept the backend or mode.
    """
    if not arguments.torch_compile:
        return
    asked = arguments.torch_compile_mode
    if asked in WITHOUT_CUDA_GRAPHS:
        arguments.torch_compile_mode = WITHOUT_CUDA_GRAPHS[asked]
        # TrainingArguments has already set the variable, and accelerate reads it later.
        os.environ["ACCELERATE_DYNAMO_MODE"] = arguments.torch_compile_mode
    # accelerate reads this when the Trainer creates its Accelerator; `accelerate launch` has set it to false.
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    if not arguments.use_liger_kernel:
        backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
        try:
            model.loss_function = torch.compile(model.loss_function, backend=backend or "inductor", mode=mode)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise ValueError(
                f"trainer.torch_compile_backend={backend} with torch_compile_mode={mode} is not what torch.compile takes: "
                f"{reason}"
            ) from None
