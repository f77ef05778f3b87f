"""Between two logged steps nothing reads a value from the device, so that on a GPU the host can run ahead of it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks

QUIET_STEPS = (1, 2)
"""The steps of the run below that do not log or prune and do not follow a step that does."""
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
"""The operations whose result the host needs before it can continue."""


def waits_in_quiet_steps(
    folder: Path, fsdp: bool, whole_blocks: bool = True, by_document: bool = False
) -> dict[str, int]:
    """Return how often each of WAITING runs in the quiet steps of a sparse run that skips updates as on a GPU."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": str(fsdp).lower(), "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
    from sparsity import Geometric, SparsityCallback
    from tests.small_trainer import document_rows, small_trainer
    from train import trainer as trainers
    from train.distributed import join_world

    # A fused optimizer on a GPU does this; it works on a CPU too.
    trainers.skips_on_device = lambda optimizer: True
    if not whole_blocks:
        trainers.attend_over_whole_blocks = lambda model: None
    trainer = small_trainer(
        folder, world=join_world(60), max_steps=4, logging_steps=4, sparsity=SparsityCallback(Geometric(0.5, 0, 0, 1)),
        by_document=by_document, rows=document_rows(64) if by_document else None,
    )  # fmt: skip
    waits: Counter[str] = Counter()

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            if name in WAITING and trainer.state.global_step in QUIET_STEPS:
                waits[name] += 1
            return func(*args, **(kwargs or {}))

    with Listening():
        trainer.train()
    assert trainer.state.global_step == 4
    return dict(waits)


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["one process", "FSDP2 on two ranks"])
def test_steps_between_logs_ask_the_device_for_nothing(tmp_path, num_ranks):
    for waits in run_ranks(waits_in_quiet_steps, num_ranks, tmp_path, num_ranks > 1, joined=False):
        assert waits == {}


def test_a_search_for_documents_would_ask_once_a_micro_batch(tmp_path):
    (waits,) = run_ranks(waits_in_quiet_steps, 1, tmp_path, False, False, joined=False)
    # Two steps of two micro-batches.
    assert waits == {"aten::_local_scalar_dense": 4}


@pytest.mark.parametrize("has_gpu", [True, False])
def test_batches_are_copied_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch, has_gpu):
    from conf.compose import composed
    from train import arguments
    from train.plan.run import plan_run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **options: options)
    config = composed("train", ["experiment=demo"])
    found = arguments.training_arguments(config, plan_run(config, 1), Path("nowhere"))
    assert found["dataloader_pin_memory"] is has_gpu
    assert found["accelerator_config"]["non_blocking"] is has_gpu


def test_attention_over_whole_blocks_is_sdpa_to_the_last_bit():
    from tests.small_trainer import random_rows, small_llama
    from train.model.attention import attend_over_whole_blocks

    model, plain = small_llama(), small_llama()
    attend_over_whole_blocks(model)
    ids = torch.stack([row["input_ids"] for row in random_rows(3)])
    for kind in (model, plain):
        kind(input_ids=ids, labels=ids).loss.backward()
    assert model.config._attn_implementation != plain.config._attn_implementation
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_another_attention_stays_as_it_was_chosen():
    from tests.small_trainer import small_llama
    from train.model.attention import attend_over_whole_blocks

    model = small_llama()
    model.set_attn_implementation("eager")
    attend_over_whole_blocks(model)
    assert model.config._attn_implementation == "eager"


def test_an_exported_config_names_no_attention(tmp_path):
    from tests.small_trainer import small_llama
    from train.model.attention import WHOLE_BLOCKS, attend_over_whole_blocks

    model = small_llama()
    attend_over_whole_blocks(model)
    model.config.save_pretrained(tmp_path)
    assert WHOLE_BLOCKS not in (tmp_path / "config.json").read_text()
