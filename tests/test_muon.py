"""Muon: in one process it equals torch's, on several ranks it makes the same update, and zeros stay zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, set_seed

from conf.compose import composed
from sparsity import Geometric, SparsityCallback
from sparsity.mask import state_holder
from tests.architectures import CONFIGS
from tests.distributed import run_ranks
from tests.small_trainer import small_llama, small_trainer
from train.arguments import training_arguments
from train.muon import MuonAdamW, check_not_offloaded, make_muon, muon_names, orthogonalised
from train.plan.run import plan_run

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def check_steps(shape: tuple[int, ...], is_muons: bool, reference: Callable[[nn.Parameter], Optimizer]) -> None:
    """Check that five steps on a parameter equal those of torch's optimizer to the last bit."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, expected = MuonAdamW([{"params": [mine], "muon": is_muons}], **OPTIONS), reference(theirs)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        expected.step()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_in_one_process_it_is_torchs_muon_to_the_last_bit(shape):
    check_steps(shape, True, lambda p: torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))


def test_the_other_parameters_are_adamws_to_the_last_bit():
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    check_steps((6,), False, lambda p: torch.optim.AdamW([p], **options))


def test_experts_are_orthogonalised_one_by_one():
    torch.manual_seed(0)
    experts = torch.randn(3, 8, 12)
    together = orthogonalised(experts)
    assert all(torch.equal(together[i], orthogonalised(experts[i])) for i in range(3))


def test_head_embedding_and_norms_are_not_muons():
    names = muon_names(small_llama())
    assert len(names) == 2 * 7
    assert all("layers" in name and "proj" in name for name in names)


class Arguments:
    learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon = 0.02, 0.1, 0.9, 0.95, 1e-8


def small_model(name: str) -> Any:
    if name == "llama":
        return small_llama()
    set_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]())


def trained(sharded: bool, name: str = "llama") -> dict[str, torch.Tensor]:
    """Return the weights after three steps, with the same rows on every rank."""
    model = small_model(name)
    if sharded:
        blocks = set(model._no_split_modules)
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module)
        fully_shard(model)
    optimizer = make_muon(model, Arguments())
    tokens = torch.arange(64).view(2, 32)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        for name, param in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_two_ranks_under_fsdp2_update_what_one_process_does_to_the_last_bit(name):
    # Both ranks see the same rows, so that the mean of their gradients is exactly the gradient of one process.
    expected = trained(False, name)
    for found in run_ranks(trained, 2, True, name, timeout_s=240):
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_the_head_of_a_tied_model_is_not_muons_and_experts_and_conv1d_are():
    assert not [name for name in muon_names(small_model("gpt2")) if "wte" in name or "head" in name]
    assert len(muon_names(small_model("gpt2"))) == 2 * 4
    experts = [name for name in muon_names(small_model("mixtral")) if "experts" in name]
    assert [name.split(".")[-1] for name in experts] == ["gate_up_proj", "down_proj"] * 2


def test_a_rank_without_experts_updates_nothing():
    assert orthogonalised(torch.empty(0, 8, 12)).shape == (0, 8, 12)


def test_parameters_in_host_memory_are_refused():
    plugin = SimpleNamespace(cpu_offload=CPUOffloadPolicy())
    with pytest.raises(ValueError, match="fsdp_offload_params: true"):
        check_not_offloaded(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    check_not_offloaded(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None)))


def test_a_setting_that_muon_would_not_read_is_refused():
    config = composed("train", ["optim=muon", "+trainer.extra.optim_args='momentum=0.9'"])
    with pytest.raises(ValueError, match=r"trainer.extra.optim_args=momentum=0.9 has no effect with optim.optim=muon"):
        training_arguments(config, plan_run(config, 1), Path("x"))


def test_pruned_weights_gradients_and_momenta_are_exactly_zero(tmp_path):
    PartialState(cpu=True)
    callback = SparsityCallback(Geometric(sparsity=0.5, start_step=1, end_step=2, every_steps=1))
    trainer = small_trainer(tmp_path, sparsity=callback, uses_muon=True)
    seen = []

    def look(*_: object) -> None:
        for param, shard in zip(callback.pruner.parameters.values(), callback.shards, strict=True):
            momentum = state_holder(trainer.optimizer).state[param]
            tensors = [param, *(value for value in momentum.values() if value.shape == param.shape)]
            seen.append(all(int((tensor.detach().view(-1)[~shard.mask] != 0).sum()) == 0 for tensor in tensors))

    callback_step = callback.on_step_end

    def on_step_end(*args: object, **kwargs: object) -> None:
        callback_step(*args, **kwargs)
        look()

    callback.on_step_end = on_step_end
    trainer.train()
    assert len(seen) == 4 * 15
    assert all(seen)


def test_it_is_an_optimizer_by_name_and_a_wrong_one_is_refused():
    assert composed("train", ["optim=muon"]).trainer.optim == "muon"
    with pytest.raises(ValueError, match=r"optim.optim=muonn is not known: did you mean muon"):
        composed("train", ["optim.optim=muonn"])
