"""The run that tests interrupt, small but with several epochs and a prune window; and the parts that they compare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.commands import errors_in, run_command
from tests.tiny_run import tiny

STEPS = 60


def interrupted(folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the overrides of a run of 60 steps of three micro-batches, 11 steps per epoch, that prunes at steps 20 to 40.

    A step has 12 sequences. Checkpoints come every 7 steps, at other steps than the ends of epochs and prune events.
    """
    return tiny(
        folder, f"run_name={name}", f"trainer.max_steps={STEPS}", "data.max_documents=44", "trainer.save_steps=7",
        "trainer.logging_steps=3", "sparsity.window.of=steps", "sparsity.window.start=20", "sparsity.window.end=40",
        "sparsity.window.every=2", "batch_size=12", *overrides,
    )  # fmt: skip


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the run's records without the figures that depend on time."""
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
    """Return the bytes of every tensor in the files that match `pattern`."""
    return {
        f"{path.name}:{name}": tensor.contiguous().view(-1).numpy().tobytes()
        for path in sorted(run_dir.glob(pattern))
        for name, tensor in load_file(path).items()
    }


def unfinished(folder: Path, whole: Path, name: str) -> Path:
    """Copy the finished run so that it looks as if it had been killed during its evaluation."""
    run_dir = folder / "runs" / name
    shutil.copytree(whole, run_dir)
    for file in ("summary.json", "report.png", "sample.txt"):
        (run_dir / file).unlink()
    config = (run_dir / "config.yaml").read_text().replace("run_name: whole", f"run_name: {name}")
    (run_dir / "config.yaml").write_text(config)
    return run_dir


def one_error(command: list[str], **options: Any) -> str:
    """Return the single error line that `python -m launch` prints."""
    done = run_command(["launch", *command, *[f"{key}={value}" for key, value in options.items()]])
    errors = errors_in(done.stderr)
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return errors[0]
