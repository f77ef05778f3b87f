"""Measure the peak memory of training steps, compare it with the plan's (`train.plan.memory`), and sparse with dense.

    python -m tests.benchmarks.memory        -> runs/bench/memory.json

Each case is a separate process (two under FSDP2) that trains a random model for a few steps. It reports how much its peak
resident memory exceeds that before the model was made; on a GPU, `torch.cuda.max_memory_allocated`. A sparse case prunes at
every step, so that its peak includes that of a prune event. The dense cases are the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

from conf.schema import ModelConfig
from tests.benchmarks.common import (
    EXACT_MEMORY,
    ONE_THREAD,
    RESULTS,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
    write_rows,
)
from tests.benchmarks.fsdp import shard
from tests.distributed import free_port
from train.plan.counts import count_parameters
from train.plan.memory import SELECTION_CHUNK, GpuMemory, Setting, gpu_memory

OUTPUT = RESULTS / "memory.json"
SMALL = {"vocab_size": 8000, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
LARGE = {"vocab_size": 16000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}


@dataclass(frozen=True)
class Case:
    """One measurement; with several `micro_batches`, gradients accumulate without being reduced, as in accelerate."""

    name: str
    width: dict[str, int]
    world_size: int = 1
    micro_batch_size: int = 4
    micro_batches: int = 1
    sequence_length: int = 256
    gradient_checkpointing: bool = False
    sparse: bool = True

    @property
    def num_prunable(self) -> int:
        return count_parameters(self.model()).linear if self.sparse else 0

    def model(self) -> ModelConfig:
        hidden, heads = self.width["hidden_size"], self.width["num_attention_heads"]
        return ModelConfig(
            name=self.name, intermediate_size=4 * hidden, num_key_value_heads=heads, **self.width
        )  # fmt: skip

    def setting(self, compute_bytes: int) -> Setting:
        return Setting(
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
            compute_bytes=compute_bytes,
            accumulates=self.micro_batches > 1,
            gradient_checkpointing=self.gradient_checkpointing,
            fsdp=self.world_size > 1 or compute_bytes == 2,
            selection_chunk=1 << 18 if compute_bytes == 4 else SELECTION_CHUNK,
        )

    def predicted(self, compute_bytes: int) -> GpuMemory:
        return gpu_memory(self.model(), self.num_prunable, self.setting(compute_bytes))


CASES = (
    Case("small", SMALL),
    Case("small, batch of 16", SMALL, micro_batch_size=16),
    Case("small, batch of 16, checkpointing", SMALL, micro_batch_size=16, gradient_checkpointing=True),
    Case("large", LARGE),
    Case("large, batch of 8", LARGE, micro_batch_size=8),
    Case("large, batch of 8, accumulation", LARGE, micro_batch_size=8, micro_batches=2),
    Case("large, two ranks", LARGE, world_size=2),
    Case("large, two ranks, accumulation", LARGE, world_size=2, micro_batches=2),
    Case("large, dense", LARGE, sparse=False),
    Case("large, batch of 8, dense", LARGE, micro_batch_size=8, sparse=False),
    Case("large, two ranks, dense", LARGE, world_size=2, sparse=False),
)


def measure(case: Case) -> dict[str, float | str | int]:
    """Run a case in new processes, and compare it with the plan."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--case", json.dumps(asdict(case))]
    processes = []
    for rank in range(case.world_size):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.world_size}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**os.environ, **ONE_THREAD, **EXACT_MEMORY, **{key: str(value) for key, value in world.items()}}
        processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
    reports = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"The case {case.name} failed, see above.")
    report = max((json.loads(text.splitlines()[-1]) for text in reports), key=lambda found: found["bytes"])
    predicted = case.predicted(report["compute_bytes"])
    return {
        "name": case.name,
        "device": report["device"],
        "num_params": count_parameters(case.model()).total,
        "measured_bytes": report["bytes"],
        "predicted_bytes": predicted.peak,
        "peak_in": predicted.peak_phase,
        "relative_error": predicted.peak / report["bytes"] - 1,
    }


def train_steps(case: Case, num_steps: int = 2) -> dict[str, float | str | int]:
    """Train a few steps; this runs in the measured process."""
    import torch
    from transformers import LlamaForCausalLM

    from train.model.build import llama_config

    on_gpu = torch.cuda.is_available() and case.world_size == 1
    device = torch.device("cuda" if on_gpu else "cpu")
    warm_up(device)
    baseline = torch.cuda.memory_allocated() if on_gpu else resident_bytes()
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(llama_config(case.model()), dtype=torch.float32)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.world_size > 1 or on_gpu:
        shard(model, device, torch.bfloat16 if on_gpu else None)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    prune = pruning(model, optimizer, num_steps) if case.sparse else lambda step: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(num_steps):
        for micro_batch in range(case.micro_batches):
            if case.world_size > 1 or on_gpu:
                model.set_requires_gradient_sync(micro_batch == case.micro_batches - 1)
            shape = (case.micro_batch_size, case.sequence_length)
            tokens = torch.randint(case.model().vocab_size, shape, device=device)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / case.micro_batches).backward()
        optimizer.step()
        prune(step)
        optimizer.zero_grad()
        if step == 0 and not on_gpu:
            reset_peak()
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return {"bytes": peak - baseline, "device": str(device), "compute_bytes": 2 if on_gpu else 4}


def pruning(model, optimizer, num_steps: int):  # type: ignore[no-untyped-def]
    """Do what the callback does after each update, with an event every time, up to 80 % at the last one."""
    from sparsity import Geometric, SparsityCallback

    callback = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    callback.bind(model)

    def prune(step: int) -> None:
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)  # type: ignore[arg-type]
        callback.pruner.prune(1 - 0.8 * (step + 1) / num_steps, optimizer)

    return prune


def warm_up(device) -> None:  # type: ignore[no-untyped-def]
    """Load the libraries that the first step would load, because their code is not part of a step's memory."""
    import torch
    from transformers import LlamaForCausalLM

    from train.model.build import llama_config

    width = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM._from_config(llama_config(Case("warm-up", width).model())).to(device)
    tokens = torch.randint(64, (2, 32), device=device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="the body of one measured process, started by this script")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(train_steps(Case(**json.loads(arguments.case)))))
        return
    found = []
    for case in CASES:
        found.append(measure(case))
        line = found[-1]
        print(
            f"{line['name']:<36} measured {line['measured_bytes'] / 2**20:8.0f} MiB   "
            f"predicted {line['predicted_bytes'] / 2**20:8.0f} MiB   {100 * line['relative_error']:+6.1f} %   "
            f"(peak in {line['peak_in']})",
            flush=True,
        )
    measured = {line["name"]: line for line in found}
    for name, line in measured.items():
        if dense := measured.get(f"{name}, dense"):
            line["over_dense"] = line["measured_bytes"] / dense["measured_bytes"]
            print(f"{name}: a sparse run's peak is {line['over_dense']:.3f} times a dense one's")
    write_rows(found, OUTPUT)
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
