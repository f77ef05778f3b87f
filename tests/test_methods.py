"""Every allowed way to prune is trained, saved, resumed on other numbers of ranks and exported; all others are refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerState, default_data_collator

from sparsity.callback import SparsityCallback
from sparsity.factors import factor_of
from sparsity.shards import shard_offset
from tests.commands import run_command
from tests.distributed import run_ranks
from tests.methods import (
    ALLOWED,
    FACTORS,
    METHODS,
    NUM_STEPS,
    REFUSED,
    Method,
    callback_of,
    reason_to_refuse,
    schedule_of,
)
from tests.test_run import tiny, write_text
from train.checkpoints.contents import optimizer_figures, parameters_of, rank_tensors
from train.checkpoints.read import CheckpointReader, load_masks, load_optimizer, load_weights
from train.checkpoints.write import Checkpoint, write_checkpoint
from train.distributed import World
from train.model.export import export_model, full_tensor
from train.resumable import row_size

CUT = 4
"""The step before which runs are saved; it is between two events of a gradual schedule."""
Masks = dict[str, Tensor]


def make_model() -> LlamaForCausalLM:
    """Return a model with odd numbers of rows, key rows that 3 ranks cannot share evenly, and, by rounding, ties."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=8,
        )
    )  # fmt: skip
    with torch.no_grad():
        for param in model.parameters():
            param.copy_((param * 200).round().clamp(min=1) / 200)
    return model


MODEL = make_model()
ROWS = torch.randint(0, 17, (5, 8), generator=torch.Generator().manual_seed(0))
TEXT = SimpleNamespace(dataset=[{"input_ids": row} for row in ROWS], collate_fn=default_data_collator)
"""Calibration text: neither 2 nor 3 ranks can share it evenly."""


class Run:
    """A run of a method on all ranks; a gradient depends only on its weight, so rounding does not depend on the world."""

    def __init__(self, method: Method) -> None:
        self.model = deepcopy(MODEL)
        if method.schedule == "fixed":
            with torch.no_grad():
                self.model.lm_head.weight.view(-1)[::3] = 0
        if dist.is_initialized():
            fully_shard(self.model.model.layers[0])
            fully_shard(self.model)
        self.world = World(*((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)), CPU)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.003, weight_decay=0.1)
        self.callback: SparsityCallback = callback_of(method)
        self.callback.bind(self.model)
        if method.schedule == "fixed":
            self.callback.pruner.inherit()

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            given = {"model": self.model, "optimizer": self.optimizer, "train_dataloader": TEXT}
            state = TrainerState(global_step=step)
            self.callback.on_step_begin(None, state, None, **given)
            torch.stack([local_loss(param, step) for param in self.model.parameters()]).sum().backward()
            self.callback.on_pre_optimizer_step(None, state, None, **given)
            self.optimizer.step()
            self.callback.on_optimizer_step(None, state, None, **given)
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        parameters = parameters_of(self.model)
        tensors, pieces, scalars = rank_tensors(self.model, self.optimizer, self.callback.shards, {}, self.world.rank)
        state = {
            "shapes": {name: list(param.shape) for name, param in parameters.items()},
            "optimizer": {"scalars": scalars, **optimizer_figures(self.optimizer, parameters)},
            "sparsity": self.callback.state(),
        }
        write_checkpoint(
            Checkpoint(folder, CUT, self.world, tensors, pieces, state, lambda path: Path(path).write_text("{}"))
        )

    def load(self, folder: Path) -> None:
        reader, parameters = CheckpointReader(folder / f"checkpoint-{CUT}"), parameters_of(self.model)
        load_weights(reader, parameters)
        load_optimizer(reader, self.optimizer, parameters)
        load_masks(reader, self.callback.shards, lambda name: row_size(parameters[name]))
        self.callback.load_state(reader.state["sparsity"], CUT)

    def weights(self) -> Masks:
        names = set(self.callback.kept)
        return {name: full_tensor(p.detach()).clone() for name, p in parameters_of(self.model).items() if name in names}


CPU = torch.device("cpu")


def local_loss(param: Tensor, step: int) -> Tensor:
    """Return a loss that pulls each weight to its own value, which changes with the step; so zeros have gradients too."""
    local = (param.to_local() if isinstance(param, DTensor) else param).view(-1)
    places = ((shard_offset(param) + torch.arange(len(local))) * 37 % (101 + step) - 50) / 4096
    return (local - places).square().sum()


def train_and_save(folder: str, methods: list[Method]) -> None:
    for method in methods:
        run = Run(method)
        run.train(0, CUT)
        run.save(Path(folder) / str(method))


def resume_and_export(folder: str, methods: list[Method]) -> dict[str, tuple[Masks, float]]:
    """Resume from checkpoints of another number of ranks; return each method's final weights and average density."""
    found = {}
    for method in methods:
        run = Run(method)
        run.load(Path(folder) / str(method))
        run.train(CUT, NUM_STEPS)
        found[str(method)] = run.weights(), run.callback.average_density
        if dist.is_initialized():
            nobody = SimpleNamespace(save_pretrained=lambda folder: None)
            export = {"dtype": "float32", "max_shard_size": "5GB", "world": run.world}
            export_model(run.model, nobody, Path(folder) / str(method) / "model", **export)
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Run]:
    """Run every method in one process without an interruption."""
    runs = {}
    for method in ALLOWED:
        runs[str(method)] = run = Run(method)
        run.train(0, NUM_STEPS)
    return runs


SOME = list(
    dict.fromkeys(
        [
            *ALLOWED[::-9],
            Method("one_shot", "global", "none", "unstructured", "saliency"),
            Method("fixed", "global", "none", "unstructured", "magnitude"),
            Method("cubic", "row", "own targets", "unstructured", "wanda"),
            Method("constant", "global", "none", "1x4", "wanda"),
            Method("constant", "global", "none", "unstructured", "wanda", "rigl"),
        ]
    )
)
"""Every ninth method of the table, and some more; together they have all values of every setting."""


def test_some_methods_meet_every_setting():
    for setting in ("schedule", "scope", "groups", "pattern", "score", "update"):
        assert {getattr(method, setting) for method in SOME} == {getattr(method, setting) for method in ALLOWED}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "methods",
    [
        pytest.param(SOME, id="some"),
        pytest.param([m for m in ALLOWED if m not in SOME], id="all others", marks=pytest.mark.cluster),
    ],
)
def test_two_ranks_go_on_as_one_and_as_three_to_the_same_weights(whole, tmp_path, methods):
    folder = tmp_path
    run_ranks(train_and_save, 2, str(folder), methods, timeout_s=250)
    alone = resume_and_export(str(folder), methods)
    for resumed in (alone, *run_ranks(resume_and_export, 3, str(folder), methods, timeout_s=250)):
        for method, (weights, average_density) in resumed.items():
            expected = whole[method]
            assert average_density == expected.callback.average_density, method
            for name, weight in expected.weights().items():
                assert torch.equal(weights[name], weight), (method, name)
    for method in map(str, methods):
        run, exported = whole[method], load_file(folder / method / "model" / "model.safetensors")
        for name, weight in run.weights().items():
            assert torch.equal(exported[name], weight), (method, name)


def pools_by_hand(method: Method, names: list[str]) -> list[list[str]]:
    """Return lists of parameters that share a threshold, or a share of each row."""
    if method.scope in ("uniform", "row"):
        return [[name] for name in names]
    # With targets by shape, each layer has its own share; they add up to the group's.
    by_target: dict[float, list[str]] = {}
    for name in names:
        by_target.setdefault(method.target(name), []).append(name)
    return list(by_target.values())


@pytest.mark.parametrize("method", [m for m in ALLOWED if m.schedule != "fixed"], ids=str)
def test_every_pool_ends_with_its_share_pruned_and_every_block_with_its_pattern(whole, method):
    weights, kept = whole[str(method)].weights(), whole[str(method)].callback.kept
    for pool in pools_by_hand(method, list(weights)):
        numel = sum(weights[name].numel() for name in pool)
        gone = round(method.target(pool[0]) * numel)
        if method.scope == "row":
            rows, columns = weights[pool[0]].shape
            gone = rows * round(method.target(pool[0]) * columns)
            assert len(set((weights[pool[0]] == 0).sum(dim=1).tolist())) == 1
        if method.pattern == "1x4":
            gone = round(gone / 4) * 4
        zeros = sum(int((weights[name] == 0).sum()) for name in pool)
        assert zeros == numel - sum(kept[name] for name in pool)
        # Each layer of erk is rounded to whole blocks by itself.
        slack = 2 * len(pool) if (method.scope, method.pattern) == ("erk", "1x4") else 0
        assert abs(zeros - gone) <= slack
    if method.pattern == "1x4":
        for name, weight in weights.items():
            assert set((weight.view(-1, 4) != 0).sum(dim=1).tolist()) <= {0, 4}, name
    elif method.pattern != "unstructured":
        kept, block = map(int, method.pattern.split(":"))
        for name, weight in weights.items():
            in_blocks = (weight.view(-1, block) != 0).sum(dim=1)
            assert set(in_blocks.tolist()) == ({kept} if method.target(name) else {block})


def test_the_pruned_of_a_pool_are_its_smallest_at_the_first_event(whole):
    names = list(whole[str(ALLOWED[0])].callback.kept)
    plain = {name: param.detach().abs() for name, param in MODEL.named_parameters() if name in names}
    products = {
        name: weight * factor_of(name, FACTORS) / weight.double().square().mean().sqrt()
        for name, weight in plain.items()
    }
    first = [m for m in ALLOWED if (m.schedule, m.pattern) == ("constant", "unstructured") and m.score != "random"]
    first = [m for m in first if m.scope in ("global", "uniform") and m.score != "wanda"]
    assert {method.score for method in first} == {"magnitude", "scaled"}
    for method in first:
        weights = plain if method.score == "magnitude" else products
        run = Run(method)
        run.callback.prune_at(0)
        masks = {shard.name: shard.mask for shard in run.callback.shards}
        for pool in pools_by_hand(method, names):
            order = torch.cat([weights[name].view(-1) for name in pool]).sort(stable=True).indices
            pruned = torch.cat([~masks[name] for name in pool]).nonzero().view(-1)
            assert set(pruned.tolist()) == set(order[: len(pruned)].tolist()), method


def test_magnitude_prunes_other_weights_than_random_and_than_its_products_with_factors(whole):
    for method in (
        m for m in ALLOWED if m.score != "magnitude" and m.pattern == "unstructured" and m.update == "shrink"
    ):
        other = Method(method.schedule, method.scope, method.groups, method.pattern, "magnitude")
        mine, theirs = whole[str(method)].weights(), whole[str(other)].weights()
        assert any(not torch.equal(mine[name] == 0, theirs[name] == 0) for name in mine), method


def test_fixed_masks_are_the_zeros_that_were_there(whole):
    (method,) = (str(m) for m in ALLOWED if m.schedule == "fixed")
    weights = whole[method].weights()
    zeros = Counter({name: int((weight == 0).sum()) for name, weight in weights.items()})
    assert +zeros == {"lm_head.weight": len(range(0, 17 * 8, 3))}
    assert whole[method].callback.average_density == pytest.approx(
        1 - len(range(0, 17 * 8, 3)) / whole[method].callback.num_prunable
    )


def test_the_table_holds_every_combination_once():
    assert len(ALLOWED) + len(REFUSED) == len(set(METHODS))
    assert (
        len(METHODS)
        == 6 * 3 * 3 * 3 * 4
        + 4 * 3 * 2 * 2 * 4
        + 1
        + 3 * 3
        + 3 * 3 * 2 * 3
        + 4
        + 3 * 2 * 3 * 4
        + 2 * 2 * 4
        + 3 * 3 * 3
        + 2
    )
    assert Counter(method.update for method in ALLOWED) == {"shrink": 350, "ste": 19, "set": 13, "rigl": 13, "acdc": 10}


@pytest.mark.parametrize("method", REFUSED, ids=str)
def test_what_does_not_go_together_is_refused_with_the_reason(method):
    with pytest.raises(ValueError, match=re.escape(reason_to_refuse(method))):
        callback_of(method)


@pytest.mark.parametrize("method", ALLOWED, ids=str)
def test_metrics_name_the_density_that_is_there(whole, method):
    run = whole[str(method)]
    figures = run.callback.metrics(NUM_STEPS - 1)
    if method.schedule != "fixed":
        # The count of each pool, of its blocks or of each row of 8 or 12 weights is rounded.
        unit = {"row": 1 / 8}.get(method.scope, (4 if method.pattern == "1x4" else 1) * 8 / 1000)
        assert figures["sparsity/density"] == pytest.approx(figures["sparsity/target_density"], abs=unit / 2)
    assert schedule_of(method).density(NUM_STEPS - 1) <= 1


def test_a_model_without_layers_of_whole_blocks_is_refused_by_name():
    method = next(m for m in ALLOWED if m.pattern == "2:4")
    model = nn.Sequential(nn.Linear(8, 3), nn.Linear(6, 4))
    with pytest.raises(
        ValueError, match=r"multiple of 4 inputs, and 1.weight has the shape \[4, 6\]: name it in requires_dense"
    ):
        callback_of(method).bind(model)


def test_a_launched_run_ends_with_2_of_4_in_every_layer(tmp_path):
    write_text(tmp_path / "text.jsonl")
    chosen = ["sparsity=two_four", "sparsity.schedule=cubic", "sparsity.scope=uniform", "logger=none"]
    done = run_command(["launch", *tiny(tmp_path), *chosen])
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "tiny"
    for name, weight in load_file(run / "model" / "model.safetensors").items():
        if "proj" in name or name == "lm_head.weight":
            assert set((weight.view(-1, 4) != 0).sum(dim=1).tolist()) == {2}, name
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["target_sparsity"], summary["sparsity"]) == (0.5, 0.5)
    assert "50% of the weights of all linear layers, 2:4 along the inputs" in (run / "model" / "README.md").read_text()
