"""A training script as a user might have it: a plain transformers.Trainer, with the three lines of the callback added.

    python -m tests.foreign_trainer OUTPUT_DIR [--sparsity 0.8] [--fsdp2] [--bf16] [--compile] [--accumulate 2] [--wandb]

Rank 0 prints its results as one line of JSON. Run it under torchrun for several processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from sparsity import Geometric, SparsityCallback

STEPS = 12


class Counting(Dataset):
    """Sequences that count up, each from another number, so that a model learns them within a few steps."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + 31 * index) % 97
        return {"input_ids": ids, "labels": ids}


def main(arguments: Sequence[str]) -> None:
    found, wants_wandb = train(arguments)
    if found is not None:
        print("\nFOUND " + json.dumps(found), flush=True)
    if wants_wandb:
        import wandb

        wandb.finish()
    # Threads of the destroyed process group would sometimes abort a normal exit of the interpreter.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train(words: Sequence[str]) -> tuple[dict[str, Any] | None, bool]:
    """Train, and return rank 0's results (None on other ranks) and whether wandb was requested."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--sparsity", type=float, default=None)
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(words)
    if options.fsdp2:
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        }
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.MULTI_GPU
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, tie_word_embeddings=options.tied, attention_dropout=0.1,
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        options.output_dir, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        logging_steps=1, save_steps=6, use_cpu=True, bf16=options.bf16, torch_compile=options.compile,
        torch_compile_backend="aot_eager" if options.compile else None,
        gradient_accumulation_steps=options.accumulate, disable_tqdm=True,
        report_to="wandb" if options.wandb else "none",
        accelerator_config={"use_configured_state": True} if options.fsdp2 else None,
    )  # fmt: skip
    callbacks = []
    if options.sparsity is not None:
        # The three lines: import, schedule, callback.
        schedule = Geometric(sparsity=options.sparsity, start_step=2, end_step=8, every_steps=2)
        callbacks = [SparsityCallback(schedule)]
    trainer = Trainer(model=model, args=arguments, train_dataset=Counting(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=options.resume)

    digest, zeros, weights = hashlib.sha256(), 0, 0
    for name, param in trainer.model.named_parameters():
        full = (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        digest.update(full.float().numpy().tobytes())
        if "proj" in name or "lm_head" in name:
            zeros, weights = zeros + int((full == 0).sum()), weights + full.numel()
    found = {
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "densities": [r.get("sparsity/density") for r in trainer.state.log_history if "loss" in r],
        "average_density": callbacks[0].average_density if callbacks else None,
        "digest": digest.hexdigest(), "zeros": zeros, "weights": weights, "world_size": arguments.world_size,
        "is_fsdp2": trainer.accelerator.is_fsdp2,
    }  # fmt: skip
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return found if trainer.is_world_process_zero() else None, options.wandb


if __name__ == "__main__":
    main(sys.argv[1:])
