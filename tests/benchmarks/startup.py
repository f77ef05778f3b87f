"""Measure the time from the command to the first step: `python -m launch` against `torchrun` of a hand-written script.

`tests.benchmarks.around` includes this measurement. Both commands start the same number of processes, train the demo's
model, write offline wandb files, and are timed until a file marks their first step. In our case the data is prepared in a
first round, which does not count; our command also checks the data and shards the model, which the script does not.

    python -m tests.benchmarks.startup FILE     is that script: a plain Trainer on random tokens; its first step makes FILE
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.common import ONE_THREAD, Comparison

TIMEOUT_S = 300


def small_llama() -> Any:
    """Return the demo's model, `model=llama_micro`, built by hand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def starting(rounds: int, folder: Path) -> Comparison:
    from launch.command import DEFAULT_CPU_PROCESSES, num_gpus

    gpus = num_gpus(os.environ)
    processes = str(gpus or DEFAULT_CPU_PROCESSES)
    metrics, mark = folder / "runs" / "start" / "metrics.jsonl", folder / "mark"
    ours = [
        *(sys.executable, "-m", "launch", "experiment=demo", f"runs_dir={folder / 'runs'}", "run_name=start"),
        *("overwrite=true", "trainer.max_steps=4", "trainer.logging_steps=1"),
    ]
    # `accelerate launch` is not used, because with --cpu it starts one process whatever --num_processes says.
    theirs = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes),
        *("-m", "tests.benchmarks.startup", str(mark)),
    ]
    environment = {**os.environ, **ONE_THREAD, "SPARSELLM_CACHE": str(folder / "cache"), "WANDB_MODE": "offline"}
    environment |= {"WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    pairs = []
    for _ in range(rounds + 1):
        pairs.append((seconds_until(ours, metrics, environment), seconds_until(theirs, mark, environment)))
    seconds, baseline = (min(taken) for taken in zip(*pairs[1:], strict=True))
    details = {"processes": int(processes)}
    return Comparison("start to the first step", seconds, "torchrun, plain Trainer", baseline, details)


def seconds_until(command: Sequence[str], sign: Path, environment: dict[str, str]) -> float:
    """Return the seconds from a command's start until it makes the file `sign`; the command then runs to its end.

    Raises:
        RuntimeError: The command failed; the message has the end of its output.
    """
    sign.unlink(missing_ok=True)
    started = time.perf_counter()
    taken = 0.0
    # The output is not a pipe, because nobody would read it while the command runs.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while not taken:
                # The process is polled before the file is checked, because it may make the file and end in between.
                ended = process.poll() is not None
                if sign.exists() and sign.stat().st_size:
                    taken = time.perf_counter() - started
                elif ended:
                    break
                elif time.perf_counter() - started > TIMEOUT_S:
                    raise TimeoutError(f"{' '.join(command)} made no step within {TIMEOUT_S} s.")
                else:
                    time.sleep(0.005)
            process.wait(timeout=TIMEOUT_S)
        finally:
            process.kill()
        output.seek(0)
        if process.returncode or not taken:
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    return taken


def first_step(mark: Path) -> None:
    """Run the script: train, and make the file `mark` on rank 0 at the end of the first step."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Mark(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                mark.write_text("stepped")

    tokens = torch.randint(2048, (16 * 4, 256))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=8, report_to="wandb", save_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(small_llama(), arguments, train_dataset=rows, callbacks=[Mark()]).train()  # type: ignore[arg-type]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    first_step(Path(sys.argv[1]))
