"""The run that the tests interrupt: small, in several epochs, with a prune window, and what is compared afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.commands import run_command
from tests.tiny_run import tiny

STEPS = 60


def interrupted(folder: Path, name: str, *overrides: str) -> list[str]:
    """60 steps of 12 sequences, 11 an epoch, three micro-batches a step, pruned at steps 20 to 40; saved out of step."""
    return tiny(
        folder, f"run_name={name}", f"trainer.max_steps={STEPS}", "data.max_documents=44", "trainer.save_steps=7",
        "trainer.logging_steps=3", "sparsity.window.of=steps", "sparsity.window.start=20", "sparsity.window.end=40",
        "sparsity.window.every=2", "batch_size=12", *overrides,
    )  # fmt: skip


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """The run's records, without the figures that are a matter of time."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in record.items()
            if key != "train/tokens_per_second" and not key.startswith("perf/")
        }
        for record in records
    ]


def tensors_of(run_dir: Path, pattern: str) -> dict[str, bytes]:
    """Every tensor's bytes, of all files that fit."""
    return {
        f"{path.name}:{name}": tensor.contiguous().view(-1).numpy().tobytes()
        for path in sorted(run_dir.glob(pattern))
        for name, tensor in load_file(path).items()
    }


def unfinished(folder: Path, whole: Path, name: str) -> Path:
    """A copy of the whole run as it would be had it been killed in its evaluation."""
    run_dir = folder / "runs" / name
    shutil.copytree(whole, run_dir)
    for file in ("summary.json", "report.png", "sample.txt"):
        (run_dir / file).unlink()
    config = (run_dir / "config.yaml").read_text().replace("run_name: whole", f"run_name: {name}")
    (run_dir / "config.yaml").write_text(config)
    return run_dir


def one_error(command: list[str], **options: Any) -> str:
    """The one line that `python -m launch` says is wrong."""
    done = run_command(["launch", *command, *[f"{key}={value}" for key, value in options.items()]])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return errors[0]
