"""A SparsityCallback among other callbacks in a Trainer: it acts last, and there is only one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from eval.model.zeros import count_zeros
from sparsity import Fixed, Geometric, SparsityCallback

STEPS = 5


def model() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )


def trainer(folder: Path, module: nn.Module, callbacks: list[TrainerCallback], **arguments) -> Trainer:
    ids = torch.arange(16)
    chosen = {"max_steps": STEPS, "save_strategy": "no", "learning_rate": 1e-2, **arguments}
    return Trainer(
        model=module,
        args=TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **chosen),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 40,
        callbacks=callbacks,
    )


def pruning(**choices) -> SparsityCallback:
    return SparsityCallback(Geometric(0.8, 1, 3, 1), **choices)


def in_place(module: nn.Module, average: dict[str, torch.Tensor]) -> None:
    for name, param in module.named_parameters():
        param.data.copy_(average[name])


def assigned(module: nn.Module, average: dict[str, torch.Tensor]) -> None:
    module.load_state_dict({**module.state_dict(), **average}, assign=True)


class Averaging(TrainerCallback):
    """A callback that averages the weights, and writes the average into the model by `write` at the event `at`."""

    def __init__(self, at: str = "on_train_end", write: Callable[..., None] = in_place) -> None:
        self.average: dict[str, torch.Tensor] = {}
        self.write = write
        setattr(self, at, self.swap)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        for name, param in model.named_parameters():
            self.average.setdefault(name, param.detach().clone()).lerp_(param.detach(), 0.1)

    def swap(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step >= STEPS:
            self.write(model, self.average)


@pytest.mark.parametrize("write", [in_place, assigned])
@pytest.mark.parametrize("at", ["on_train_end", "on_step_end"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "after ours"])
def test_an_average_of_weights_is_as_sparse_as_it_says_whatever_the_order(tmp_path, at, write, is_first):
    ours, theirs, module = pruning(), Averaging(at, write), model()
    run = trainer(tmp_path, module, [theirs, ours] if is_first else [ours, theirs])
    run.train()
    assert ours.density == pytest.approx(0.2, abs=1e-3)
    assert count_zeros(module).num_zeros == round(0.8 * ours.num_prunable)
    kept = module.model.layers[0].mlp.up_proj.weight
    average = theirs.average["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(kept[kept != 0], average[kept != 0])
    run.save_model(str(tmp_path / "saved"))
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert count_zeros(saved).num_zeros == round(0.8 * ours.num_prunable)


def test_a_callback_that_asks_for_a_checkpoint_after_ours_gets_a_sparse_one_with_its_state(tmp_path):
    class SaveNow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.lm_head.weight.add_(1)
                control.should_save = True

    ours = pruning()
    trainer(tmp_path, model(), [ours, SaveNow()]).train()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert count_zeros(saved).num_zeros == round(0.8 * ours.num_prunable)
    assert '"surviving_zeros"' in (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()


def test_a_model_whose_weight_changed_its_shape_is_refused_by_name(tmp_path):
    class Grow(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight = nn.Parameter(torch.ones(40, 16))

    with pytest.raises(ValueError, match=r"lm_head.weight is not in the model any more with the shape \[32, 16\]"):
        trainer(tmp_path, model(), [pruning(), Grow()]).train()


def test_callbacks_keep_their_order_but_for_ours(tmp_path):
    class First(TrainerCallback):
        pass

    class Second(TrainerCallback):
        pass

    run = trainer(tmp_path, model(), [pruning(), First(), Second()])
    run.train()
    order = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert [name for name in order if name in ("DefaultFlowCallback", "First", "Second")][-2:] == ["First", "Second"]
    assert (order[0], order[-1]) == ("DefaultFlowCallback", "SparsityCallback")


@pytest.mark.parametrize(
    "second",
    [lambda first: pruning(include=["*mlp*"]), lambda first: SparsityCallback(Fixed()), lambda first: first],
    ids=["another", "fixed", "the same"],
)
def test_a_second_sparsity_callback_is_refused_before_the_first_step(tmp_path, second):
    first, module = pruning(include=["*attn*"]), model()
    before = [param.clone() for param in module.parameters()]
    with pytest.raises(ValueError, match=r"^This Trainer has two SparsityCallbacks.*groups="):
        trainer(tmp_path, module, [first, second(first)]).train()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_one_callback_serves_one_training_after_another(tmp_path):
    ours, module = pruning(), model()
    run = trainer(tmp_path, module, [ours])
    run.train()
    run.train()
    trainer(tmp_path, module, [SparsityCallback(Fixed())]).train()
    assert count_zeros(module).num_zeros == round(0.8 * ours.num_prunable)
