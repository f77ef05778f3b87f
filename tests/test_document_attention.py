"""data.attention=document: a document in a packed block is read as if it were alone, and its first token is not predicted."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor

from tests.distributed import run_ranks
from tests.small_trainer import ALONE, LENGTH, VOCABULARY, document_rows, small_llama, small_trainer
from tests.test_no_sync import waits_in_quiet_steps
from train.data.collate import collate_documents, document_ends
from train.data.stream import positions_within
from train.model.attention import DOCUMENTS, attend_by_document, attend_within_documents, document_mask
from train.scoring import Documents, score_stream

STARTS = np.array([5, 6, 20])


def documents_of(row: Tensor, starts: np.ndarray) -> list[Tensor]:
    bounds = [0, *starts.tolist(), len(row)]
    return [row[begin:end] for begin, end in pairwise(bounds) if end > begin]


def batch_of(row: Tensor, starts: np.ndarray) -> dict[str, Tensor]:
    positions = positions_within(starts, len(row))[None]
    return {"input_ids": row[None], "position_ids": positions, "cu_seq_lens_q": document_ends(positions)}


def test_positions_restart_at_each_document():
    assert positions_within(np.array([2, 3]), 6).tolist() == [0, 1, 0, 0, 1, 2]
    assert positions_within(np.array([0, 4]), 6).tolist() == [0, 1, 2, 3, 0, 1]


def test_ends_of_all_rows_have_few_lengths_and_end_in_the_number_of_tokens():
    ends = document_ends(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]))
    assert ends.tolist() == [0, 2, 4, 7, *[8] * 29]
    assert len(document_ends(torch.zeros(3, 11, dtype=torch.int64))) == 65


def test_the_mask_is_causal_within_documents_and_a_sliding_window():
    ends = torch.tensor([0, 1, 4, 4], dtype=torch.int32)
    assert document_mask(ends, 1, 4)[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert document_mask(ends, 1, 4, 2)[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("heads", [2, 1], ids=["multi-head", "grouped"])
def test_logits_and_gradients_in_a_block_equal_those_of_each_document_alone(heads):
    packed, alone = small_llama(num_key_value_heads=heads), small_llama(num_key_value_heads=heads)
    attend_within_documents(packed)
    row = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
    found = packed(**batch_of(row, STARTS)).logits[0]
    parts = [alone(input_ids=document[None]).logits[0] for document in documents_of(row, STARTS)]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-6)
    for logits in (found, torch.cat(parts)):
        F.cross_entropy(logits, row).backward()
    for mine, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_without_documents_rows_are_attended_whole():
    model, plain = small_llama(), small_llama()
    attend_within_documents(model)
    ids = torch.arange(LENGTH)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_another_attention_is_refused_by_name():
    model = small_llama()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"model\.attn_implementation=eager would be ignored"):
        attend_within_documents(model)


def losses_and_weights(folder: Path, micro_batch: int, accumulation: int, **changes: Any) -> tuple[Tensor, Tensor]:
    os.environ |= {
        "ACCELERATE_USE_FSDP": str("WORLD_SIZE" in os.environ).lower(), "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
    from train.distributed import join_world

    if "WORLD_SIZE" in os.environ:
        world = join_world(60)
    else:
        PartialState(cpu=True)
        world = ALONE
    trainer = small_trainer(
        folder, world=world, rows=document_rows(64), by_document=True, max_steps=3,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation, **changes,
    )  # fmt: skip
    trainer.train()
    weight: Any = trainer.model.model.layers[0].mlp.up_proj.weight
    return trainer.step_losses(), weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()


def test_the_loss_of_a_step_is_the_mean_over_its_predicted_tokens_however_they_are_shared(tmp_path):
    losses, weight = losses_and_weights(tmp_path / "one", 8, 1)
    batch = collate_documents(document_rows(64))
    sampler = small_trainer(tmp_path / "order", rows=document_rows(64), by_document=True)._get_train_sampler()
    rows = [document_rows(64)[index] for index in list(sampler)[:8]]
    model = small_llama()
    nats, count = 0.0, 0
    for row in rows:
        starts = (row["position_ids"] == 0).nonzero().flatten().numpy()[1:]
        for document in documents_of(row["input_ids"], starts):
            if len(document) > 1:
                logits = model(input_ids=document[None]).logits[0]
                nats += float(F.cross_entropy(logits[:-1].detach(), document[1:], reduction="sum"))
                count += len(document) - 1
    assert float(losses[0]) == pytest.approx(nats / count, rel=1e-6)
    assert count < 8 * (LENGTH - 1)
    assert batch["labels"][0, 3] == -100
    shared = losses_and_weights(tmp_path / "micro", 2, 4)
    ranks = run_ranks(losses_and_weights, 2, tmp_path / "ranks", 2, 2, joined=False)
    for others in (shared, *ranks):
        torch.testing.assert_close(others[0], losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(others[1], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2], ids=["one process", "FSDP2 on two ranks"])
def test_steps_between_logs_ask_the_device_for_nothing(tmp_path, num_ranks):
    for waits in run_ranks(waits_in_quiet_steps, num_ranks, tmp_path, num_ranks > 1, True, True, joined=False):
        assert waits == {}


def test_a_compiled_step_trains_what_an_eager_one_does(tmp_path):
    eager = losses_and_weights(tmp_path / "eager", 4, 2)
    compiled = losses_and_weights(tmp_path / "compiled", 4, 2, torch_compile=True, torch_compile_backend="aot_eager")
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bos", [None, 7], ids=["no bos", "bos"])
def test_the_score_of_a_text_is_that_of_its_documents_read_alone(bos):
    model, alone = small_llama().eval(), small_llama().eval()
    attend_within_documents(model)
    tokens = np.random.default_rng(0).integers(8, VOCABULARY, 90)
    starts, window = np.array([1, 4, 5, 30, 32, 64, 89]), 16
    if bos is not None:
        tokens[starts] = bos
    score = score_stream(model, tokens, window=window, batch_size=2, world=ALONE, documents=Documents(starts, bos))
    every: list[float | None] = []
    inside = []
    for place in range(1, len(tokens)):
        # A window reads `window` tokens and predicts the one after each.
        begin = max((place - 1) // window * window, int(starts[starts <= place].max()))
        if begin == place:
            every.append(np.log(VOCABULARY) if bos is None else None)
            continue
        logits = alone(input_ids=torch.from_numpy(tokens[None, begin:place])).logits[0, -1].detach()
        every.append(-float(logits.log_softmax(-1)[tokens[place]]))
        if place % window and place < len(tokens) // window * window:
            inside.append(every[-1])
    known = [nats for nats in every if nats is not None]
    assert score.num_tokens == len(known)
    assert score.nats == pytest.approx(sum(known), rel=1e-5)
    assert score.num_window_tokens == len(inside)
    assert score.window_nats == pytest.approx(sum(inside), rel=1e-5)


@pytest.mark.parametrize(("window", "dtype"), [(None, torch.float32), (4, torch.float32)])
def test_attention_by_mask_is_a_loop_over_documents(window, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 8, 16, generator=generator, dtype=dtype) for _ in range(3))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    layer = torch.nn.Module()
    found, _ = attend_by_document(
        layer, query, key, value, None, scaling=0.25, cu_seq_lens_q=document_ends(positions), sliding_window=window
    )
    for row, bounds in ((0, [(0, 3), (3, 8)]), (1, [(0, 8)])):
        for begin, end in bounds:
            places = torch.arange(end - begin)
            distance = places[:, None] - places
            mask = (distance >= 0) & (distance < (window or 99))
            part = [states[row, :, begin:end] for states in (query, key, value)]
            expected = F.scaled_dot_product_attention(*part, attn_mask=mask, scale=0.25)
            torch.testing.assert_close(found[row, begin:end], expected.transpose(0, 1))


def test_the_exported_config_names_no_attention(tmp_path):
    model = small_llama()
    attend_within_documents(model)
    model.config.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text()
