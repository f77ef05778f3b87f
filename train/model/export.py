"""Export of the final model: a plain transformers folder with exact zeros, written without holding the whole model
anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsity.common.files import publish_folder, write_atomically
from sparsity.prunable import plain_name
from train.checkpoints.contents import buffers_of
from train.checkpoints.tensorfile import write_tensors
from train.distributed import World
from train.model.parametrisation import query_folds, unfolded
from train.model.portable import make_portable
from train.model.stored import stored_form

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_model(model: Any, tokenizer: Any, folder: Path, *, dtype: str, max_shard_size: str, world: World) -> None:
    """Write config, generation config, tokenizer and safetensors; the folder appears only when it is complete.

    Folded query weights are multiplied back, so that a plain transformers LLaMA gives the model's logits. Experts are
    stored one by one, as transformers' save_pretrained does, and buffers in their own type. Weights are gathered tensor
    by tensor, and rank 0 holds the weights of one file at a time.

    Collective: every rank calls it.

    Args:
        model: The trained model, sharded or not.
        tokenizer: The tokenizer to save with it.
        folder: Where to write.
        dtype: The type of the stored weights, a key of `DTYPES`.
        max_shard_size: The largest size of a file, such as 5GB.
        world: This process and its peers.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    buffers, folds = buffers_of(model), query_folds(model)
    tensors = {**full_names(model), **buffers}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * DTYPES[dtype].itemsize,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,
        max_shard_size=max_shard_size,
    )
    stored_in: dict[str, str] = {}
    for filename, names in split.filename_to_tensors.items():
        held: dict[str, Tensor] = {}
        for name in names:
            full = full_tensor(tensors[name])
            if world.is_main:
                kept = full.dtype if name in buffers else DTYPES[dtype]
                full = unfolded(full, folds.get(name, 1.0)).to("cpu", kept)
                held |= {stored: part.contiguous() for stored, part in stored_form(model, name, full).items()}
            del full
        stored_in |= dict.fromkeys(held, filename)
        if world.is_main:
            write_tensors(aside / filename, held, {"format": "pt"})
    if not world.is_main:
        return
    if split.is_sharded:
        import json

        index = {"metadata": split.metadata, "weight_map": stored_in}
        write_atomically(aside / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    config = model.config.__class__.from_dict({**model.config.to_dict(), "dtype": dtype, "use_cache": True})
    config.architectures = [type(unwrapped(model)).__name__.removeprefix("FSDP")]
    config.save_pretrained(aside)
    model.generation_config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    make_portable(aside)
    publish_folder(aside, folder)


def full_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors by their transformers names; a tied weight appears once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) not in seen:
            seen.add(id(param))
            tensors[plain_name(name)] = param.detach()
    return tensors


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank; release it soon.

    Collective: every rank that holds a part of the tensor calls it.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile's wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)
