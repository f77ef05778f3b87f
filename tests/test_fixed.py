"""Fixed masks: a sparse model is trained on or fine-tuned, in anybody's Trainer, and its zeros stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparsity import Fixed, OneShot, SparsityCallback
from tests.test_export import tokenizer_in

STEPS = 4


def sparse_model(folder: Path) -> Path:
    """A folder with a small model, 70 % of its linear weights zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    callback = SparsityCallback(OneShot(0.7, 0))
    callback.bind(model)
    callback.prune_at(0)
    model.save_pretrained(folder)
    return folder


def assert_only_survivors_moved(folder: Path, model: nn.Module) -> None:
    before = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        if "proj" in name or name == "lm_head.weight":
            assert torch.equal(weight == 0, before[name] == 0), name
            assert not torch.equal(weight, before[name]), name


def test_a_foreign_trainer_keeps_the_zeros_and_resumes_with_them(tmp_path):
    folder = sparse_model(tmp_path / "model")
    data = [{"input_ids": torch.arange(i, i + 16), "labels": torch.arange(i, i + 16)} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, use_cpu=True,
        weight_decay=0.1, disable_tqdm=True, report_to="none", logging_steps=1,
    )  # fmt: skip
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    callback = SparsityCallback(Fixed())
    Trainer(model=whole, args=arguments, train_dataset=data, callbacks=[callback]).train()
    assert_only_survivors_moved(folder, whole)
    assert callback.average_density == pytest.approx(0.3, abs=1e-4)

    resumed = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = SparsityCallback(Fixed())
    trainer = Trainer(model=resumed, args=arguments, train_dataset=data, callbacks=[again])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert again.average_density == pytest.approx(callback.average_density)


def test_trls_sft_trainer_keeps_the_zeros(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'sparsellm[dev]'")
    folder = sparse_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, max_length=32,
        bf16=False, disable_tqdm=True, report_to="none", logging_steps=1, save_strategy="no", weight_decay=0.1,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": ["a few words to train on"] * 16}),
        processing_class=tokenizer_in(tmp_path / "tokenizer"),
        callbacks=[SparsityCallback(Fixed())],
    )
    trainer.train()
    assert_only_survivors_moved(folder, model)
    assert trainer.state.log_history[-2]["sparsity/density"] == pytest.approx(0.3, abs=1e-4)


def test_a_parameter_of_zeros_alone_is_pointed_out():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    callback = SparsityCallback(Fixed())
    callback.bind(layer)
    with pytest.warns(UserWarning, match="weight is all zeros and stays so; name it in requires_dense"):
        callback.inherit()
