"""A small sparse model and comparisons to the last bit, for tests of the compact format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity.compact import compact_folder
from sparsity.prunable import own_linear_weights

IDS = torch.arange(24).view(2, 12)


def sparse_model(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in own_linear_weights(model).values():
            weight.masked_fill_(torch.rand_like(weight) < 0.8, 0)
    return model


def write_folders(base: Path) -> dict[str, Path]:
    """Write a model folder with several files, and its compact form."""
    sparse_model().save_pretrained(base / "plain", max_shard_size="20KB")
    compact_folder(base / "plain", base / "compact")
    assert len(list((base / "compact").glob("*.safetensors"))) > 2
    return {"plain": base / "plain", "compact": base / "compact"}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and bytes_of(first) == bytes_of(second)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check_equal(model: torch.nn.Module, expected: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert same_bits(found[name], tensor.to(dtype)), name
