"""Masks that move, compared step by step with plain one-process references written from the papers, on several ranks too."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from sparsity import Constant, Cubic, SparsityCallback
from sparsity.schedule import Alternating
from sparsity.update import AcDc, Rigl, Set, Ste
from tests.distributed import run_ranks
from tests.small_trainer import random_rows, small_llama, small_trainer
from tests.update_references import assert_same, reference_of
from tests.update_runs import CASES, NUM_STEPS, SHAPES, Run, Tensors, history_of
from train.trainer import PretrainingTrainer


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_paper(case):
    history, average_density = history_of(case)
    reference = reference_of(case)
    assert_same(history, reference)
    assert average_density == pytest.approx(sum(reference.densities) / NUM_STEPS)


@pytest.mark.parametrize("case", ["set", "rigl", "granet", "ste", "ste, gradual"])
def test_masks_move_and_weights_return_at_a_constant_or_falling_density(case):
    history, _ = history_of(case)
    returned = 0
    for (before, _), (after, _) in pairwise(history):
        returned += sum(int((after[name] & ~before[name]).sum()) for name in SHAPES)
        assert sum(int(mask.sum()) for mask in after.values()) <= sum(int(mask.sum()) for mask in before.values())
    assert returned > 5


def test_grown_weights_start_at_0_with_moments_of_0_and_the_step_of_a_move_trains_nothing():
    run = Run("rigl")
    run.train(0, 3)
    masks, weights = run.history[-1]
    run.train(3, 4)
    for name, param in run.callback.pruner.parameters.items():
        grown = run.masks()[name] & ~masks[name]
        survived = run.masks()[name] & masks[name]
        state = run.optimizer.state[param]
        assert int(grown.sum()) > 0
        assert (param[grown] == 0).all()
        assert (state["exp_avg"][grown] == 0).all()
        assert (state["exp_avg_sq"][grown] == 0).all()
        assert torch.equal(param[survived], weights[name][survived])
        assert state["step"] == 3


def histories(layout: str, cases: list[str]) -> dict[str, list[tuple[Tensors, Tensors]]]:
    return {case: history_of(case, layout)[0] for case in cases}


@pytest.mark.parametrize(
    ("layout", "num_ranks", "cases"),
    [("fsdp2", 2, list(CASES)), ("ddp", 2, ["set", "rigl", "ste", "acdc"]), ("hsdp", 4, ["rigl", "granet", "ste"])],
)
def test_ranks_take_the_steps_of_the_paper(layout, num_ranks, cases):
    for found in run_ranks(histories, num_ranks, layout, cases, timeout_s=200):
        for case, history in found.items():
            assert_same(history, reference_of(case))


# --- in a Trainer: ours and a plain one ---


def updating_callback(name: str) -> SparsityCallback:
    schedule = Alternating(0.7, 1, 5, 2) if name == "acdc" else Cubic(0.7, 1, 5, 2)
    update = {"set": Set(0.5, 2, 1), "rigl": Rigl(0.5, 2, 1), "ste": Ste(0.5, 2, 1), "acdc": AcDc()}[name]
    return SparsityCallback(schedule, update=update, scope="uniform", report=False)


def trained(folder: Path, name: str, kind: type[Trainer], checkpoint: Path | None = None) -> tuple[Tensors, float]:
    """Return the weights after 8 steps and the average density; a checkpoint is saved before step 5."""
    callback = updating_callback(name)
    if kind is PretrainingTrainer:
        PartialState(cpu=True)
        saving = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 3}
        trainer: Trainer = small_trainer(folder, sparsity=callback, max_steps=8, **saving)
    else:
        arguments = TrainingArguments(
            str(folder), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
            save_steps=5, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model=small_llama(), args=arguments, train_dataset=random_rows(64), callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, callback.average_density


@pytest.mark.parametrize("kind", [PretrainingTrainer, Trainer])
@pytest.mark.parametrize("name", ["set", "rigl", "ste", "acdc"])
def test_a_trainer_resumes_to_the_last_bit(tmp_path, name, kind):
    whole, density = trained(tmp_path / "whole", name, kind)
    resumed, same_density = trained(tmp_path / "resumed", name, kind, tmp_path / "whole" / "checkpoint-5")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    assert same_density == density
    linear = [weight for name, weight in whole.items() if "proj" in name or "lm_head" in name]
    assert sum(int((w == 0).sum()) for w in linear) == sum(round(0.7 * w.numel()) for w in linear)


def test_a_plain_trainer_without_the_masked_values_is_refused():
    run = Run("ste")
    run.train(0, 4)
    for state in run.optimizer.state.values():
        del state["latent"]
    with pytest.raises(
        ValueError, match=r"no values of the masked weights of 0.weight, which update=ste trains.*launch"
    ):
        run.callback.rule.check_restored(run.optimizer)


def test_zeros_that_are_to_be_kept_do_not_go_with_weights_that_return():
    with pytest.raises(ValueError, match="keep_zeros=True keeps the zeros of a sparse model, but update=set"):
        SparsityCallback(Constant(0.5), update="set", keep_zeros=True)
