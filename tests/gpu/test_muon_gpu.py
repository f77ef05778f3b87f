"""Muon and mixtures of experts on the device under FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM

from sparsity import Geometric, SparsityCallback
from tests.distributed import mesh_of_one
from train.muon import MuonAdamW, muon_names

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with mesh_of_one(DEVICE) as mesh:
        yield mesh


def mixture() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=16, use_cache=False,
        )
    )  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def test_an_event_prunes_experts_as_on_the_cpu_and_muon_keeps_their_zeros(mesh):
    expected = mixture()
    on_cpu = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    on_cpu.bind(expected)
    on_cpu.pruner.prune(0.2)

    model = mixture().to(DEVICE)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    callback = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    callback.bind(model)
    names = set(muon_names(model))
    assert any("experts" in name for name in names)
    parameters = dict(model.named_parameters())
    optimizer = MuonAdamW(
        [
            {"params": [param for name, param in parameters.items() if (name in names) == is_muon], "muon": is_muon}
            for is_muon in (True, False)
        ],
        **OPTIONS,
    )
    callback.pruner.prune(0.2, optimizer)
    zeros = {name: param == 0 for name, param in expected.named_parameters() if name in callback.pruner.parameters}
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = []
    for step in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        for name, zero in zeros.items():
            assert torch.equal(whole(parameters[name]) == 0, zero), (step, name)
    assert losses[-1] < losses[0]
