"""torch.compile where it pays: block by block, and the loss."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel, TrainingArguments

WITHOUT_CUDA_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs"}
"""Blocks share one compiled graph: replayed as a CUDA graph, a block's output would be overwritten by the next block's."""


def compile_by_blocks(model: PreTrainedModel, arguments: TrainingArguments) -> None:
    """Have accelerate compile each block by itself, and compile the loss, where `arguments` ask for torch.compile.

    Blocks are alike, so that one graph serves all of them, and FSDP2's hooks lie between the graphs: in a model that is
    compiled as a whole they break it into pieces. The loss, which widens the logits to float32, becomes one pass over
    them; Liger's kernel, which never has all logits, does without it. max-autotune tunes kernels without CUDA graphs. A
    ValueError says which backend or mode there isn't.
    """
    if not arguments.torch_compile:
        return
    asked = arguments.torch_compile_mode
    if asked in WITHOUT_CUDA_GRAPHS:
        arguments.torch_compile_mode = WITHOUT_CUDA_GRAPHS[asked]
        # TrainingArguments has handed it on already, and accelerate reads it here.
        os.environ["ACCELERATE_DYNAMO_MODE"] = arguments.torch_compile_mode
    # accelerate reads it when the Trainer makes its Accelerator, and `accelerate launch` has set it to false.
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
