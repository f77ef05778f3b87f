"""Wanda against a plain reference from its paper, and activation norms that do not depend on the number of ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerState

from conf.schema import SparsityConfig
from sparsity import Cubic, OneShot, SparsityCallback
from sparsity.event.activations import Calibration, calibration_of, input_norms
from sparsity.schedule import Schedule
from tests.distributed import run_ranks
from tests.small_trainer import random_rows, small_llama, small_trainer
from tests.test_distributed import full_masks

SEQUENCES = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(5)]
"""Neither 2 nor 4 ranks can share them evenly."""


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4, bias=False))


def text_of(rows: list[Tensor], **more: Any) -> SimpleNamespace:
    return SimpleNamespace(dataset=rows, collate_fn=lambda items: items[0], **more)


def pruned_by_hand(model: nn.Sequential, share: float) -> dict[str, Tensor]:
    """The paper's rule: in each row the weights with the smallest |w| ||x|| go; masks from the dense model's activations."""
    inputs = torch.cat(SEQUENCES)
    masks = {}
    for name, layer, own in (
        ("0.weight", model[0], inputs),
        ("3.weight", model[3], torch.tanh(inputs @ model[0].weight.detach().T)),  # type: ignore[operator,union-attr]
    ):
        weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
        mask = torch.ones_like(weight, dtype=torch.bool)
        for row in range(weight.shape[0]):
            metric = [
                abs(float(weight[row, column])) * float(own[:, column].square().sum().sqrt())
                for column in range(weight.shape[1])
            ]
            order = sorted(range(weight.shape[1]), key=lambda column, metric=metric: metric[column])
            for column in order[: round(share * weight.shape[1])]:
                mask[row, column] = False
        masks[name] = mask
    return masks


def callback_of(schedule: Schedule, scope: str = "row") -> SparsityCallback:
    return SparsityCallback(schedule, score="wanda", scope=scope, report=False)


def test_one_shot_takes_the_smallest_products_of_each_row():
    model, callback = make_model(), callback_of(OneShot(0.5, 0))
    expected = pruned_by_hand(model, 0.5)
    callback.bind(model)
    state = torch.get_rng_state()
    callback.on_step_begin(None, TrainerState(global_step=0), None, model=model, train_dataloader=text_of(SEQUENCES))
    for shard in callback.shards:
        assert torch.equal(shard.mask.view(shard.shape), expected[shard.name]), shard.name
    assert torch.equal(torch.get_rng_state(), state)
    assert model[2].training, "the model goes on in training mode"
    assert not model[0]._forward_pre_hooks


def test_an_event_later_sees_the_activations_of_the_model_as_it_is_then():
    model, callback = make_model(), callback_of(Cubic(0.75, 0, 2, 2))
    callback.bind(model)
    callback.on_step_begin(None, TrainerState(global_step=0), None, model=model, train_dataloader=text_of(SEQUENCES))
    before = dict(callback.pruner.input_norms)
    assert callback.kept == {"0.weight": 6 * 1, "3.weight": 4 * 2}, "a cubic takes most at first"
    callback.on_step_begin(None, TrainerState(global_step=1), None, model=model, train_dataloader=text_of(SEQUENCES))
    assert callback.pruner.input_norms["3.weight"] is before["3.weight"], "no event, no calibration"
    callback.on_step_begin(None, TrainerState(global_step=2), None, model=model, train_dataloader=text_of(SEQUENCES))
    after = callback.pruner.input_norms
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])


def test_norms_are_those_of_all_tokens_and_keep_small_inputs():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    rows = [torch.tensor([[3e4, 1e-5, 0.0], [4e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e-5, 2.0], [0.0, 0.0, 0.0]])]
    calibration = Calibration(2, lambda index: rows[index])
    (norms,) = input_norms(model, {"0.weight": model[0].weight}, calibration, torch.device("cpu")).values()
    assert norms.tolist() == pytest.approx([5e4, 2**0.5 * 1e-5, 2.0], rel=3e-3)


def test_sequences_are_spread_over_the_training_data():
    rows = [torch.full((1, 1), float(number)) for number in range(10)]
    calibration = calibration_of(text_of(rows), 4)
    assert [float(calibration.fetch(index)) for index in range(4)] == [1, 3, 6, 8]
    assert calibration_of(text_of(rows), 128).num_sequences == 10


# --- ranks ---


def masks_of(layout: str, scope: str) -> tuple[list[Any], dict[str, Tensor]]:
    model: nn.Module = make_model()
    if layout in ("fsdp2", "hsdp"):
        shape = (2, dist.get_world_size() // 2) if layout == "hsdp" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for part in (model[0], model[3], model):  # type: ignore[index]
            fully_shard(part, mesh=mesh)
    wrapped = DistributedDataParallel(model) if layout == "ddp" else model
    callback = callback_of(Cubic(0.5, 0, 2, 1), scope)
    callback.bind(wrapped)
    for step in range(3):
        callback.on_step_begin(
            None, TrainerState(global_step=step), None, model=wrapped, train_dataloader=text_of(SEQUENCES)
        )
    return full_masks(callback), callback.pruner.input_norms


@pytest.mark.parametrize(("layout", "num_ranks"), [("fsdp2", 2), ("ddp", 2), ("hsdp", 4)])
def test_ranks_choose_the_masks_of_one_process(layout, num_ranks):
    for scope in ("row", "global"):
        masks, norms = masks_of("one", scope)
        for found_masks, found_norms in run_ranks(masks_of, num_ranks, layout, scope):
            assert all(map(torch.equal, found_masks, masks)), scope
            for name, own in norms.items():
                assert torch.equal(found_norms[name], own), (scope, name)


def test_a_collator_that_draws_random_numbers_does_not_change_those_of_the_run():
    def masked(items: list[Tensor]) -> Tensor:
        kept = torch.rand(items[0].shape) > 0.1
        return items[0] * kept * (random.random() + np.random.rand())  # noqa: NPY002 - a user's collator

    model, callback = make_model(), callback_of(OneShot(0.5, 0))
    callback.bind(model)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    callback.calibrate(model, SimpleNamespace(dataset=SEQUENCES, collate_fn=masked))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected  # noqa: NPY002


# --- a Trainer ---


def test_a_run_of_our_trainer_is_pruned_before_its_first_step(tmp_path):
    PartialState()
    rows, seen = random_rows(64), {}

    class Watching(SparsityCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            if state.global_step == 0:
                seen.update(self.pruner.input_norms)

    callback = Watching(OneShot(0.5, 0), score="wanda", scope="row", calibration=8, report=False)
    model = small_llama()
    layer = model.model.layers[1].mlp.down_proj
    dense = layer.weight.detach().clone()
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for index in range(8):
            model(input_ids=rows[8 * index + 4]["input_ids"][None])
    hook.remove()
    norms = torch.cat(inputs).double().square().sum(0).sqrt()
    trainer = small_trainer(tmp_path, model=model, rows=rows, sparsity=callback)
    trainer.train()
    assert seen["model.layers.1.mlp.down_proj.weight"].tolist() == pytest.approx(norms.tolist(), rel=1e-5)
    order = (dense.abs() * norms.float()).argsort(dim=1)[:, :32]
    assert int((layer.weight.gather(1, order) != 0).sum()) == 0
    assert int((layer.weight == 0).sum()) == 32 * 32


# --- what cannot be ---


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 4))
        self.is_transposed = False


def test_experts_in_one_tensor_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), Expert())
    with pytest.raises(
        ValueError, match=r"1\.gate_up_proj is not the weight of an nn\.Linear, which shows them: name it in"
    ):
        callback_of(OneShot(0.5, 0)).bind(model)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        used: Tensor = self.used(inputs)
        return used


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([torch.ones(2, 4)], "idle.weight saw no input"),
        ([torch.full((2, 4), torch.inf)], "used.weight saw an input that is not"),
    ],
)
def test_a_layer_that_sees_nothing_or_infinities_is_refused_by_name(rows, words):
    callback = callback_of(OneShot(0.5, 0))
    callback.bind(Idle())
    with pytest.raises(ValueError, match=words):
        callback.calibrate(Idle(), text_of(rows))


def test_a_stream_of_data_is_refused_before_training():
    with pytest.raises(ValueError, match="this Trainer's data is a stream"):
        calibration_of(SimpleNamespace(dataset=iter([]), collate_fn=list), 4)


class Stream(IterableDataset[Tensor]):
    """A stream that knows its length, as many do for progress bars."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(4)

    def __len__(self) -> int:
        return 1


def test_a_stream_with_a_length_is_refused_too():
    with pytest.raises(ValueError, match="this Trainer's data is a stream"):
        calibration_of(DataLoader(Stream()), 4)


def test_pruning_without_norms_names_what_to_call():
    callback = callback_of(OneShot(0.5, 0))
    callback.bind(make_model())
    with pytest.raises(ValueError, match=r"needs activation norms: call the pruner's calibrate\(\) before"):
        callback.pruner.prune(0.5)


def test_rows_that_have_lost_more_are_refused(tmp_path: Path):
    model = make_model()
    with torch.no_grad():
        model[0].weight[2, :3] = 0  # type: ignore[index,operator]
    callback = SparsityCallback(OneShot(0.5, 0), scope="row", keep_zeros=True)
    callback.bind(model)
    callback.pruner.inherit()
    with pytest.raises(ValueError, match=r"1 rows of 0\.weight have more than 2 of 4 weights pruned already"):
        callback.prune_at(0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"score": "wanda", "calibration": 0}, "calibration=0 must be"),
        ({"calibration": 5}, "no effect with score=magnitude"),
    ],
)
def test_a_number_of_sequences_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SparsityConfig(target=0.5, **settings)
