"""torch.compile where it pays: block by block, and the loss."""

from __future__ import annotations

import os

import torch
from transformers import LlamaForCausalLM, TrainingArguments


def compile_by_blocks(model: LlamaForCausalLM, arguments: TrainingArguments) -> None:
    """Have accelerate compile each block by itself, and compile the loss, where `arguments` ask for torch.compile.

    Blocks are alike, so that one graph serves all of them, and FSDP2's hooks lie between the graphs: in a model that is
    compiled as a whole they break it into pieces. The loss, which widens the logits to float32, becomes one pass over
    them; Liger's kernel, which never has all logits, does without it. A ValueError says which backend or mode there isn't.
    """
    if not arguments.torch_compile:
        return
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
