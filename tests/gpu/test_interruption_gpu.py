"""A run of `python -m launch` on the device: SIGTERM ends it after a checkpoint, and the same command completes it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsity.schedule import Geometric
from tests.processes import launched, send
from tests.tiny_run import tiny, write_text
from train.faults.stop import PREEMPTED_CODE

pytestmark = pytest.mark.gpu
STEPS = 200 if torch.cuda.is_available() else 40
"""The number of steps. On a GPU a step takes milliseconds, and the signal must come before the last one."""
WINDOW = (10, 30, 5)


def command(folder: Path, name: str) -> list[str]:
    start, end, every = WINDOW
    return tiny(
        folder, f"run_name={name}", "logger=none", f"trainer.max_steps={STEPS}", "sparsity.target=0.8",
        "sparsity.window.of=steps", f"sparsity.window.start={start}", f"sparsity.window.end={end}",
        f"sparsity.window.every={every}", "trainer.save_steps=100", "launch.num_processes=1", "model.hidden_size=64",
        "data.max_documents=60", "trainer.disable_tqdm=true",
    )  # fmt: skip


def visible() -> dict[str, str]:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if torch.cuda.is_available() else ""
    return {"CUDA_VISIBLE_DEVICES": devices}


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def bits_of_float32(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def is_bfloat16(value: float) -> bool:
    return bits_of_float32(value) & 0xFFFF == 0


@pytest.mark.timeout(600 if not torch.cuda.is_available() else 110)
def test_a_run_that_is_stopped_by_sigterm_resumes_where_it_was_and_ends_as_sparse_as_planned(tmp_path):
    write_text(tmp_path / "text.jsonl")
    run_dir = tmp_path / "runs" / "stopped"
    arguments = command(tmp_path, "stopped")
    with launched(arguments, run_dir, **visible()) as run:
        run.wait_for_step(14)
        send(run.process.pid, signal.SIGTERM)
        assert run.wait(200) == PREEMPTED_CODE, run.stderr[-3000:]
    stopped_at = records_of(run_dir)[-1]["train/global_step"]
    assert 14 <= stopped_at < STEPS
    assert not (run_dir / "summary.json").exists()
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()] == [f"checkpoint-{stopped_at}"]
    before = records_of(run_dir)
    with launched(arguments, run_dir, **visible()) as run:
        assert run.wait(200) == 0, run.stderr[-3000:]
        assert "resumed from" in run.stdout
    records, summary = records_of(run_dir), json.loads((run_dir / "summary.json").read_text())
    assert records[: len(before)] == before
    assert [record["train/global_step"] for record in records] == list(range(1, STEPS + 1))
    start, end, every = WINDOW
    schedule = Geometric(0.8, start, end, every)
    for record in records:
        planned = schedule.density(record["train/global_step"] - 1)
        assert record["sparsity/density"] == pytest.approx(planned, abs=1e-4)
    assert summary["steps"] == STEPS
    kept = sum(
        int(tensor.count_nonzero())
        for file in (run_dir / "model").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "proj" in name or "lm_head" in name
    )
    assert kept == summary["nonzero_linear_params"] == round(0.2 * summary["linear_params"])
    # Under bf16 on a GPU, losses are still logged in float32; a bfloat16 number would end with 16 zero bits.
    assert sum(is_bfloat16(record["train/loss"]) for record in records) < STEPS / 4
