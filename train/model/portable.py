"""Compatible config files for an exported folder, so that transformers 4 and 5 load the same model from it.

transformers 5 writes names that transformers 4 does not know: version 4 rejects the tokenizer's class, and falls back
to its default if it finds no rope_theta. So both names are written; either version ignores names that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAST_CLASS = "PreTrainedTokenizerFast"
"""The class that both versions use for a tokenizer read from tokenizer.json alone."""


def make_portable(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json of `folder` so that transformers 4 reads them as 5 does."""
    _rewrite(folder / "config.json", portable_config)
    # Without tokenizer.json the class is already one that both versions have.
    if (folder / "tokenizer.json").is_file():
        _rewrite(folder / "tokenizer_config.json", portable_tokenizer_config)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json with the names of transformers 4 added to those of 5."""
    config = dict(config)
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    # If each kind of layer has its own rope, this is a table of tables, which transformers 4 stores under other names.
    if isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return config


def portable_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json with a class and names of special tokens that both versions know."""
    config = dict(config)
    # Some other classes encode differently in transformers 4: its LlamaTokenizer adds a bos in front.
    config["tokenizer_class"] = FAST_CLASS
    # A list under this key makes transformers 4 fail; both versions read the older name.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    table = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
