"""Checkpoints that are written in the background hold, bit for bit, the device's values from when the save began."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.process import in_own_process
from train.checkpoints import layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
def test_copies_to_the_host_hold_what_the_stream_had_written_before_and_nothing_after():
    """A long product is still running when the copy is requested, and the tensor changes right after that."""
    from train.checkpoints.background import host_copies

    size = 4096 if DEVICE.type == "cuda" else 64
    ones = torch.ones(size, size, device=DEVICE)
    weight = ones
    for _ in range(20):
        weight = weight @ ones / size
    weight = weight * 3
    bits = torch.arange(7, dtype=torch.uint8)
    copies = host_copies({"w": weight, "bits": bits}, {})
    weight.zero_()
    bits.zero_()
    assert copies["w"].device.type == "cpu"
    assert copies["w"].is_pinned() == (DEVICE.type == "cuda")
    assert copies["w"].eq(3).all()
    assert copies["bits"].tolist() == list(range(7))
    again = host_copies({"w": weight, "bits": bits}, copies)
    assert again["w"].data_ptr() == copies["w"].data_ptr()
    assert not again["w"].any()


def sixteen_steps(folder: Path, async_save: bool) -> dict[str, Any]:
    """Prune before the fourth of sixteen steps, save after every second; return the files of checkpoints 4 and 16."""
    from train.determinism import compute_deterministically

    compute_deterministically()

    from sparsity import OneShot, SparsityCallback
    from tests.small_trainer import random_rows, small_llama, small_trainer
    from train.distributed import join_world

    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 64}
    trainer = small_trainer(
        folder, world=join_world(60), model=small_llama(**shape), rows=random_rows(64, 64, 512), max_steps=16,
        bf16=DEVICE.type == "cuda", save_strategy="steps", save_steps=2, save_total_limit=8, logging_steps=16,
        sparsity=SparsityCallback(OneShot(0.5, 3), report=False), async_save=async_save,
    )  # fmt: skip
    trainer.train()
    assert [layout.damage(found) for found in layout.checkpoints(folder)] == [None] * 8
    folders = [layout.folder_of(folder, step) for step in (4, 16)]
    return {
        f"{found.name}/{name}": hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for found in folders
        for name, tensor in load_file(found / layout.rank_file(0)).items()
        if not name.startswith("rng/")
    }


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_run_saved_in_the_background_leaves_the_bits_of_one_saved_at_once(tmp_path):
    at_once = in_own_process(sixteen_steps, tmp_path / "at once", False)
    later = in_own_process(sixteen_steps, tmp_path / "later", True)
    assert later.keys() == at_once.keys()
    assert any("/mask/" in name for name in later)
    assert [name for name in later if later[name] != at_once[name]] == []
