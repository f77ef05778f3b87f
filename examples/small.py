"""A small LLaMA and a text that is part of every Python, shared by the examples so that each can show one thing."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

BLOCK = 128


class Bytes(Dataset):
    """A data set of Python's own help texts, cut into blocks of bytes."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        self.blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.blocks) // BLOCK

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index * BLOCK : (index + 1) * BLOCK]
        return {"input_ids": block, "labels": block}


def small_llama() -> LlamaForCausalLM:
    """Return a LLaMA with 0.15 M linear weights whose tokens are bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=BLOCK,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def arguments(folder: str, max_steps: int, learning_rate: float) -> TrainingArguments:
    """Return the arguments of a plain Trainer; none of them concerns sparsity."""
    return TrainingArguments(
        folder, max_steps=max_steps, per_device_train_batch_size=8, learning_rate=learning_rate, warmup_steps=10,
        lr_scheduler_type="cosine", logging_steps=25, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def print_history(trainer: Trainer) -> None:
    """Print the loss, and the density that the callback adds to the Trainer's log history."""
    for record in trainer.state.log_history:
        if "loss" in record:
            print(f"step {record['step']:4}  loss {record['loss']:.3f}  density {record['sparsity/density']:.3f}")
