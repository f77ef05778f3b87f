"""A transformers model folder, local or fetched from the hub."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""The files fetched from a hub repository in addition to its config: safetensors and tokenizer, never pickles or code."""


def model_folder(spec: str, key: str, *, weights: bool = False) -> Path:
    """Return the local folder of a model; a hub model is fetched into the hub's cache first.

    Args:
        spec: A folder, or a hub name such as `Qwen/Qwen3-0.6B`.
        key: The user's name for `spec` in errors.
        weights: Whether to fetch weights and tokenizer too, not only config.json.

    Raises:
        ValueError: `spec` is not a folder, and it cannot be fetched from the hub.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"{key}={spec} is a file: give the folder that holds it, with {CONFIG} and safetensors.")
    if spec.startswith((".", "~", "/")) or spec.count("/") > 1:
        raise ValueError(f"{key}={spec} does not exist: give a transformers folder or a hub name.")
    return _from_hub(spec, key, weights)


def is_at_hand(spec: str) -> bool:
    """Return whether a folder or hub name can be read without the network."""
    if Path(spec).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(spec, CONFIG), str)
    except ValueError:
        return False


def _from_hub(name: str, key: str, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    from train.plan import hub

    offline = not hub.is_reachable()
    try:
        if weights:
            return Path(snapshot_download(name, allow_patterns=list(WEIGHTS), local_files_only=offline))
        return Path(hf_hub_download(name, CONFIG, local_files_only=offline)).parent
    except Exception as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        reason = "it does not answer, and its cache here has none of that name" if offline else words
        raise ValueError(
            f"{key}={name} is not a folder here and cannot be fetched from the hub ({reason}): give a transformers folder, or "
            "connect to the network."
        ) from None
