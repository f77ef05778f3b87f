"""Wanda in a Trainer: a layer that sees no input is found early, and a run that it stops can be resumed or branched from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sparsity import Cubic, OneShot, SparsityCallback
from tests.small_trainer import small_trainer
from tests.test_wanda import SEQUENCES
from train.checkpoints import layout
from train.faults.stop import RunStopped
from train.pruning import RunSparsity


class Leaving(nn.Module):
    """A classifier with a second layer that is no longer called after some training steps, as an expert may lose its tokens."""

    def __init__(self, last_step: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last_step, self.step = last_step, 0

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.used(inputs)
        if self.step <= self.last_step:
            hidden = hidden + self.idle(inputs)
        self.step += self.training
        return {"loss": hidden.square().mean()}


def trainer_of(folder: Path, model: nn.Module, **choices: Any) -> Trainer:
    settings: dict[str, Any] = {"score": "wanda", "scope": "row", "calibration": 4} | choices
    callback = SparsityCallback(Cubic(0.5, 3, 6, 3), report=False, **settings)
    arguments = TrainingArguments(
        str(folder), max_steps=8, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"inputs": row[0]} for row in SEQUENCES * 4]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


def test_a_layer_that_nothing_calls_is_refused_before_the_first_step(tmp_path):
    model = Leaving(last_step=-1)
    with pytest.raises(
        ValueError, match=r"^idle\.weight saw no input on the calibration text, because no token reaches"
    ):
        trainer_of(tmp_path, model).train()
    assert model.step == 0


def test_a_layer_that_loses_its_tokens_ends_the_run_with_a_checkpoint_that_can_be_resumed(tmp_path):
    model = Leaving(last_step=3)
    words = (
        r"^Before step 6, idle\.weight saw no input .*, and resume from the checkpoint of step 6 with that change\.$"
    )
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, model).train()
    assert model.step == 6
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-6"]
    resumed = trainer_of(tmp_path, Leaving(last_step=-1), score="magnitude", calibration=128)
    resumed.train(resume_from_checkpoint=True)
    assert int((resumed.model.idle.weight == 0).sum()) == 8


def test_before_the_first_event_a_run_is_resumed_without_the_layer(tmp_path):
    model = Leaving(last_step=1)
    with pytest.raises(ValueError, match=r"^Before step 3, idle"):
        trainer_of(tmp_path, model).train()
    resumed = trainer_of(tmp_path, Leaving(last_step=-1), requires_dense=["idle.weight"])
    resumed.train(resume_from_checkpoint=True)
    assert int((resumed.model.idle.weight == 0).sum()) == 0
    assert int((resumed.model.used.weight == 0).sum()) == 8


class Closing(RunSparsity):
    """Calibration that fails before step 2, as for a layer that loses its tokens."""

    def calibrate(self, model: nn.Module, loader: Any, device: torch.device | None = None) -> None:
        if self._num_steps:
            raise ValueError("a.weight saw no input: name it in requires_dense.")
        super().calibrate(model, loader, device)


@pytest.mark.parametrize("async_save", [False, True])
def test_our_trainer_stops_with_a_complete_checkpoint_to_branch_from(tmp_path, async_save):
    PartialState()
    callback = Closing(OneShot(0.5, 2), score="wanda", scope="row", calibration=8, report=False)
    trainer = small_trainer(tmp_path, sparsity=callback, async_save=async_save)
    words = (
        r"^Before step 2, a\.weight saw no input: .*, and begin another run with branch_from=RUN@2 and that change\.$"
    )
    with pytest.raises(RunStopped, match=words):
        trainer.train()
    assert [(folder.name, layout.damage(folder)) for folder in layout.checkpoints(tmp_path)] == [
        (layout.folder_of(tmp_path, 2).name, None)
    ]


def test_a_branch_takes_the_masks_of_those_that_it_prunes_itself_and_tries_its_calibration(tmp_path):
    model, callback = Leaving(last_step=9), RunSparsity(OneShot(0.5, 0), report=False, requires_dense=["idle.weight"])
    callback.bind(model)
    state = {"density_sum": 3.0, "num_steps": 3, "threshold": None, "inherited": {}}
    callback.carry_over({**state, "kept": {"used.weight": 16, "idle.weight": 8}}, 0)
    assert callback.kept == {"used.weight": 16}
    assert callback._is_new
