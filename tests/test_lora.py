"""LoRA under a schedule: its second matrix begins at 0, and must not be pruned before it has learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from sparsity import Fixed, Geometric, SparsityCallback

NOTICE = (
    r"are trained and pruned \(.*lora_A.*linear weights are frozen and stay as they are \(.*q_proj.base_layer.weight"
)


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'sparsellm[dev]'")
    set_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def train(model: nn.Module, folder: Path, callback: SparsityCallback) -> None:
    ids = torch.arange(16)
    arguments = TrainingArguments(
        str(folder), max_steps=8, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 16, callbacks=[callback],
        data_collator=default_data_collator,
    ).train()  # fmt: skip


@pytest.mark.parametrize(
    "callback",
    [
        lambda: SparsityCallback(Geometric(0.8, 1, 4, 1)),
        lambda: SparsityCallback(Geometric(0.8, 6, 6, 1), scope="uniform"),
        lambda: SparsityCallback(Fixed()),
    ],
    ids=["window from step 1", "uniform", "fixed"],
)
def test_an_adapter_that_begins_at_zero_is_refused_before_training(tmp_path, callback):
    model = adapted()
    before = [param.clone() for param in model.parameters()]
    refused = pytest.raises(ValueError, match=r"lora_B.default.weight \(and 3 more\) is all zeros.*'\*lora_B\*'")
    with pytest.warns(UserWarning, match=NOTICE), refused:
        train(model, tmp_path, callback())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_adapter_learns_with_its_second_matrix_dense(tmp_path):
    model = adapted()
    callback = SparsityCallback(Geometric(0.5, 1, 4, 1), requires_dense=["*lora_B*"])
    with pytest.warns(UserWarning, match=NOTICE):
        train(model, tmp_path, callback)
    first = [param for name, param in model.named_parameters() if "lora_A" in name]
    second = [param for name, param in model.named_parameters() if "lora_B" in name]
    assert sum(int((param == 0).sum()) for param in first) == 4 * 4 * 16 // 2
    assert all((param != 0).any() for param in second)


def test_a_schedule_that_prunes_nothing_leaves_an_adapter_alone(tmp_path):
    model = adapted()
    with pytest.warns(UserWarning, match=NOTICE):
        train(model, tmp_path, SparsityCallback(Geometric(0.0, 1, 4, 1)))
    assert all((param != 0).any() for name, param in model.named_parameters() if "lora_B" in name)
