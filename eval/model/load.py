"""Loading any causal language model that transformers knows, from a folder or the hub. Code in the folder is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparsity.compact  # noqa: F401 - transformers then loads compact folders
from eval.model.causal import check_architecture
from eval.model.shards import load_sharded
from train.data import hub
from train.distributed import World, wants_fsdp

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


def model_folder(name: str) -> str:
    """Return the folder `name`, or the cached snapshot of the hub's model `name`; only safetensors are fetched.

    Raises:
        ValueError: There is no such folder, and the hub's model cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model={name} holds no config.json: give a transformers folder, such as a run's model/.")
        return str(path)
    if path.exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise ValueError(
            f"model={name} is not a folder: give a transformers folder, such as a run's model/, or a hub name."
        )
    from huggingface_hub import snapshot_download

    online = hub.is_reachable()
    try:
        return snapshot_download(name, allow_patterns=[*WEIGHTS, *TOKENIZER], local_files_only=not online)
    except Exception as error:
        reason = _first_line(error) if online else "it does not answer, and its cache here has none of that name"
        raise ValueError(
            f"model={name} is not a folder here and cannot be fetched from the hub ({reason}): give a transformers folder."
        ) from None


def model_config(folder: str) -> Any:
    """Return the transformers config of a causal language model.

    Raises:
        ValueError: The folder cannot be read, or the model is not a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _refusal(folder, error) from None
    check_architecture(folder, config)
    return config


def pick_device(device: str, world: World) -> torch.device:
    """Return this rank's device.

    Raises:
        ValueError: This machine does not have the device, or one is named although there are several processes.
    """
    if world.size > 1:
        if device != "auto":
            raise ValueError(f"device={device} is for one process; {world.size} take their own: remove it.")
        return world.device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind == "cuda" and not (index or "0").isdecimal():
        raise ValueError(f"device={device} is not known: choose auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device} is not there, this machine shows {torch.cuda.device_count()} GPUs: choose device=cpu."
        )
    return torch.device(device)


def load_model(folder: str, config: Any, dtype: str, world: World) -> Any:
    """Load the model in eval mode on `world.device`, sharded if accelerate is set to FSDP.

    Safetensors are preferred; pickles are read only as plain tensors.

    Collective: over all ranks.

    Raises:
        ValueError: A weight is missing or has another shape; transformers would replace it by random values.
    """
    resolved = stored_dtype(folder, config) if dtype == "auto" else getattr(torch, dtype)
    if world.size > 1 and wants_fsdp():
        model = load_sharded(folder, config, resolved, world, lambda: load_whole(folder, resolved))
    else:
        model = load_whole(folder, resolved).to(world.device)
    return model.eval().requires_grad_(False)


def load_whole(folder: str, dtype: torch.dtype) -> Any:
    """Load the whole model on the CPU.

    Raises:
        ValueError: The folder cannot be loaded, or a weight is missing or has another shape.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            # Mismatched sizes get their own error below.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise _refusal(folder, error) from None
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model={folder} lacks {len(missing)} of its weights, such as {missing[0]}: copy the folder again."
        )
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"model={folder} has {name} stored as {tuple(stored)}, but its config.json asks for {tuple(expected)}: copy the "
            "folder again."
        )
    return model


def stored_dtype(folder: str, config: Any) -> torch.dtype:
    """Return the dtype in config.json, or else that of the first tensor in the files.

    Raises:
        ValueError: A file cannot be read.
    """
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = [file.get_tensor(name).dtype for name in list(file.keys())[:1]]
        except Exception as error:
            raise _refusal(folder, error) from None
        if dtypes and dtypes[0].is_floating_point:
            return dtypes[0]
    return torch.float32


def vocabulary_size(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _refusal(folder: str, error: Exception) -> ValueError:
    reason = _first_line(error)
    if not isinstance(error, ValueError | OSError | json.JSONDecodeError):
        reason = f"{type(error).__name__}: {reason}"
    return ValueError(
        f"model={folder} cannot be loaded ({reason}): give a folder that transformers' save_pretrained wrote."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
