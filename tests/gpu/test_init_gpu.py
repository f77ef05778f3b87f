"""Weights drawn into a GPU's memory equal those drawn on a CPU, and the host holds one layer at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def builder(num_layers: int = 2, width: int = 64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return lambda: LlamaForCausalLM(config)


def drawn(build: Any, device: str, sharded: bool = False) -> Any:
    from tests.benchmarks.fsdp import shard
    from train.model.weights import allocate, draw_weights, skeleton

    model = skeleton(build)
    if sharded:
        shard(model, torch.device(device))
    else:
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    allocate(model, torch.device(device))
    draw_weights(model, skeleton(build), 5)
    return model


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "FSDP2"])
def test_a_gpu_gets_the_weights_that_a_cpu_draws_to_the_last_bit(sharded):
    from train.model.export import full_names, full_tensor

    build = builder()
    expected = full_names(drawn(build, "cpu"))
    found = full_names(drawn(build, "cuda", sharded))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.device.type == "cuda"
        assert torch.equal(full_tensor(tensor).cpu(), expected[name]), name


def test_the_host_holds_one_layer_of_a_model_that_is_drawn_on_a_gpu():
    from tests.benchmarks.common import peak_resident_bytes, reset_peak, resident_bytes

    drawn(builder(), "cuda", sharded=True)
    build = builder(num_layers=24, width=1024)
    before = resident_bytes()
    if not reset_peak():
        pytest.skip("the system does not allow the peak to be reset")
    model = drawn(build, "cuda", sharded=True)
    whole = 4 * sum(param.numel() for param in model.parameters())
    layer = 4 * sum(param.numel() for param in model.model.layers[0].parameters())
    assert whole > 1.4e9
    assert peak_resident_bytes() - before < 2 * layer + 200e6
