"""Between two logged steps the host does not wait: torch raises at any operation that would make it wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.process import in_own_process

STEPS, QUIET_FROM, QUIET_TO = 10, 3, 9
"""The number of steps, and the two steps after which torch begins and stops to raise; the last step logs."""


def train_in_silence(folder: Path, compiled: bool, by_document: bool = False) -> dict[str, Any]:
    """Train, and return the steps that ran while torch would have raised at a host sync, and the losses."""
    import torch
    from transformers import TrainerCallback

    from sparsity import Geometric, SparsityCallback
    from tests.small_trainer import document_rows, small_trainer
    from train.distributed import join_world

    quiet: list[int] = []

    class Silence(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available() and state.global_step in (QUIET_FROM, QUIET_TO):
                torch.cuda.set_sync_debug_mode("error" if state.global_step == QUIET_FROM else "default")
            if QUIET_FROM < state.global_step <= QUIET_TO:
                quiet.append(state.global_step)

    trainer = small_trainer(
        folder, world=join_world(60), bf16=True, max_steps=STEPS, logging_steps=STEPS, torch_compile=compiled,
        sparsity=SparsityCallback(Geometric(0.5, 0, 0, 1)), by_document=by_document,
        rows=document_rows(64) if by_document else None,
    )  # fmt: skip
    trainer.add_callback(Silence())
    trainer.train()
    return {"quiet": quiet, "losses": trainer.step_losses().tolist()}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("by_document", [False, True], ids=["whole blocks", "by document"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_steps_between_logs_make_the_host_wait_for_nothing(tmp_path, compiled, by_document):
    found = in_own_process(train_in_silence, tmp_path, compiled, by_document)
    assert found["quiet"] == list(range(QUIET_FROM + 1, QUIET_TO + 1))
    # The loss stays at the logarithm of the vocabulary, because random rows teach nothing.
    assert found["losses"][0] == pytest.approx(4.85, abs=0.1)
