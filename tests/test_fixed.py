"""Fixed masks: a sparse model is trained further or fine-tuned, in any Trainer, and its zeros stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparsity import Fixed, OneShot, SparsityCallback
from sparsity.resume import STATE_KEY
from sparsity.schedule import Schedule
from tests.test_export import tokenizer_in

STEPS = 4


def sparse_model(folder: Path) -> Path:
    """Write a folder with a small model, 70 % of whose linear weights are zero."""
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


def foreign_trainer(folder: Path, output: Path, schedule: Schedule, **options: Any) -> tuple[Trainer, SparsityCallback]:
    """Return a user's Trainer of the sparse model in `folder`, and the callback in it."""
    data = [{"input_ids": torch.arange(i, i + 16), "labels": torch.arange(i, i + 16)} for i in range(16)]
    arguments = TrainingArguments(
        str(output), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, use_cpu=True,
        weight_decay=0.1, disable_tqdm=True, report_to="none", logging_steps=1, **options,
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    callback = SparsityCallback(schedule)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    return trainer, callback


def test_a_resume_without_the_callbacks_record_still_leaves_checkpoints_to_resume_from(tmp_path):
    folder = sparse_model(tmp_path / "model")
    foreign_trainer(folder, tmp_path, Fixed())[0].train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][STATE_KEY]
    path.write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "checkpoint-4")
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        trainer, callback = foreign_trainer(folder, tmp_path, Fixed())
        trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert callback.density == pytest.approx(0.3, abs=1e-4)
        assert callback.metrics(3)["sparsity/target_density"] == pytest.approx(callback.density)


def test_the_best_model_of_a_run_that_prunes_is_refused(tmp_path):
    folder = sparse_model(tmp_path / "model")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match="before the last prune event"):
        foreign_trainer(folder, tmp_path, OneShot(0.8, 2), **options)[0].train()


def test_a_foreign_trainer_keeps_the_zeros_and_resumes_with_them(tmp_path):
    folder = sparse_model(tmp_path / "model")
    trainer, callback = foreign_trainer(folder, tmp_path, Fixed())
    whole = trainer.model
    trainer.train()
    assert_only_survivors_moved(folder, whole)
    assert callback.average_density == pytest.approx(0.3, abs=1e-4)

    trainer, again = foreign_trainer(folder, tmp_path, Fixed())
    resumed = trainer.model
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
        callback.pruner.inherit()
