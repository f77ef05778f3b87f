"""The steps of other code that `tests.benchmarks.throughput` measures: those of `transformers.Trainer` unchanged."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from tests.benchmarks.common import laps_between, mark

if TYPE_CHECKING:
    from tests.benchmarks.throughput_variants import Variant, Workload


def run_trainer(work: Workload, device: str, variant: Variant, warm_up: int) -> tuple[list[float], float]:
    """Return the seconds of each step of `transformers.Trainer` after the warm-up, and the last loss.

    The Trainer has bf16 and no other setting, as a user would first write it, or is compiled as runs are.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from train.speed.compiled import compile_by_blocks

    laps: list[Any] = []
    compiled = bool(variant.compiled)

    class Lap(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda" and len(laps) == warm_up:
                torch.cuda.reset_peak_memory_stats()
            laps.append(mark(device))

    class KeepsLoss(Trainer):
        last = torch.zeros(())

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            self.last = found.detach()
            return found

    tokens = torch.cat(work.batches("cpu"))
    blocks = [{"input_ids": row, "labels": row} for row in tokens] * (-(-(warm_up + work.steps + 1) // 4))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=warm_up + work.steps + 1, per_device_train_batch_size=work.batch, bf16=True,
            use_cpu=device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, torch_compile=compiled,
            torch_compile_backend=variant.backend if compiled else None,
        )  # fmt: skip
        with torch.device(device):
            model = LlamaForCausalLM(work.config())
        compile_by_blocks(model, arguments)
        trainer = KeepsLoss(model, arguments, train_dataset=blocks, callbacks=[Lap()])  # type: ignore[arg-type]
        trainer.train()
    return laps_between(laps, device)[warm_up:], float(trainer.last)
