"""Our Trainer on a tiny model and rows of random tokens, for tests that inspect its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator, set_seed

from sparsity import SparsityCallback
from train.data.collate import collate_documents
from train.data.stream import NOT_PREDICTED, positions_within
from train.distributed import World
from train.faults.guard import StepGuard
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import Preemption
from train.speed.compiled import compile_by_blocks
from train.trainer import PretrainingTrainer, RunState

VOCABULARY = 128
LENGTH = 32
ALONE = World(0, 1, torch.device("cpu"))


def small_llama(**changes: Any) -> LlamaForCausalLM:
    set_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "use_cache": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


def random_rows(num_rows: int, length: int = LENGTH, vocab_size: int = VOCABULARY) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocab_size, (num_rows, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def document_rows(num_rows: int) -> list[dict[str, torch.Tensor]]:
    """Return the rows of `random_rows`, cut into documents whose number and lengths differ from row to row."""
    rows = []
    for number, row in enumerate(random_rows(num_rows)):
        starts = np.arange(3 + number % 7, LENGTH, 5 + number % 3)
        labels = row["labels"].clone()
        labels[[0, *starts]] = NOT_PREDICTED
        rows.append({**row, "labels": labels, "position_ids": positions_within(starts, LENGTH)})
    return rows


def small_trainer(
    folder: Path,
    *,
    world: World = ALONE,
    model: LlamaForCausalLM | None = None,
    rows: list[dict[str, torch.Tensor]] | None = None,
    sparsity: SparsityCallback | None = None,
    kind: type[PretrainingTrainer] = PretrainingTrainer,
    async_save: bool = False,
    uses_muon: bool = False,
    by_document: bool = False,
    **changes: Any,
) -> PretrainingTrainer:
    """Return a Trainer for four steps of two micro-batches of two rows; it logs every step and saves nothing.

    `changes` are changes of its TrainingArguments.
    """
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch_fused",
        "use_cpu": world.device.type == "cpu", "logging_nan_inf_filter": False, "average_tokens_across_devices": False,
        "remove_unused_columns": False, "dataloader_drop_last": True, "dataloader_pin_memory": world.device.type == "cuda",
        "accelerator_config": {
            "use_configured_state": True, "use_seedable_sampler": False, "non_blocking": world.device.type == "cuda",
        },
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(options | changes))
    model = model or small_llama()
    compile_by_blocks(model, arguments)
    return kind(
        world=world,
        evaluator=lambda module: {},
        sparsity=sparsity,
        run_state=RunState(identity={}),
        guard=StepGuard(world, Preemption(), max_skipped=10),
        heartbeat=Heartbeat(world.rank, world.size),
        batch_size=world.size * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        model=model,
        args=arguments,
        train_dataset=rows or random_rows(64),
        data_collator=collate_documents if by_document else default_data_collator,
        callbacks=[sparsity] if sparsity else [],
        async_save=async_save,
        uses_muon=uses_muon,
        by_document=by_document,
    )


def three_steps(folder: Path | str, compiled: bool) -> TrainingArguments:
    """Return arguments of a plain Trainer for three steps on the CPU, which saves nothing."""
    return TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, torch_compile=compiled,
        torch_compile_backend="aot_eager" if compiled else None, accelerator_config={"use_configured_state": True},
    )  # fmt: skip
