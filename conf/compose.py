"""Composing configs, with Hydra's messages in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from conf.schema import SCHEMAS, Config, PlanConfig, register

LISTS = ("runs", "predict.overrides")
"""Keys whose value `quoted_list` quotes."""
TEXTS = ("title",)
"""Keys whose value `quoted_text` quotes."""
PATHS = ("folder", "out")
"""Keys whose value `quoted_path` quotes."""


def composed(config_name: str, overrides: Sequence[str]) -> Any:
    """The typed config that `overrides` make of `config_name`; a ValueError says in one sentence what is wrong."""
    register()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return OmegaConf.to_object(compose(config_name, overrides=list(overrides)))
    except (HydraException, OSError) as error:
        raise ValueError(composition_sentence(error, *schemas_of(config_name))) from error


def schemas_of(config_name: str) -> tuple[Any, ...]:
    """The classes whose keys a command takes; a run's keys are the plan's too."""
    return (Config, PlanConfig) if config_name in ("train", "plan") else (SCHEMAS[config_name],)


def quoted_list(argument: str) -> str:
    """runs=a/sparsity.target=0.8,b as runs=['a/sparsity.target=0.8','b']: Hydra reads no bare `=` or `,` in a value.

    Values that are quoted or nested are left as they are.
    """
    key, _, value = argument.partition("=")
    if key not in LISTS or re.search(r"""['"{}$]|.\[|\].""", value):
        return argument
    names = [name.strip() for name in value.removeprefix("[").removesuffix("]").split(",")]
    return f"{key}=[{','.join(_quoted(name) for name in names if name)}]"


def quoted_text(argument: str) -> str:
    """title=80 % & its twin as title='80 % & its twin': free text has what Hydra's grammar does not."""
    key, _, value = argument.partition("=")
    return f"{key}={_quoted(value)}" if key in TEXTS and value != "null" else argument


def quoted_path(argument: str) -> str:
    """model=a/sparsity.target=0.8 as folder='a/sparsity.target=0.8'.

    By its own name Hydra would look for the value of model= among the configs in conf/model.
    """
    key, equals, value = argument.partition("=")
    key = "folder" if key == "model" and equals else key
    return f"{key}={_quoted(value)}" if key in PATHS and value else f"{key}{equals}{value}"


def _quoted(text: str) -> str:
    """`text` between quotes, as Hydra reads any character; what a user has quoted stays as it is."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text if is_quoted else QuotedString(text, Quote.single).with_quotes()


def check_arguments(config_name: str, arguments: Sequence[str]) -> None:
    """Compose what Hydra is about to, so that a mistake is said in one sentence; calls with flags are left to Hydra."""
    if not any(argument.startswith("-") for argument in arguments):
        composed(config_name, arguments)


def composition_sentence(error: Exception, *schemas: Any) -> str:
    """Hydra's message in one line, without its search path and advice; a mistyped key gets the nearest of `schemas`."""
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    lines = [line.strip() for part in (error, cause) for line in str(part).split("Config search path")[0].splitlines()]
    idle = ("See https", "full_key", "object_type", "reference_type", "To append")
    said = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(idle)))
    unknown = re.search(r"Could not override '([\w.]+)'|Key '(\w+)' not in", said)
    if unknown is None:
        return said
    key = (unknown[1] or unknown[2]).split(".")[-1]
    paths = {path.split(".")[-1]: path for schema in schemas for path in key_paths(schema)}
    near = difflib.get_close_matches(key, paths, n=1)
    return said.rstrip(".") + (f": did you mean {paths[near[0]]}?" if near else ": conf/ lists the keys there are.")


def key_paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a config dataclass's keys, at any depth, the outer ones last."""
    for key, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from key_paths(kind, f"{prefix}{key}.")
        yield f"{prefix}{key}"
