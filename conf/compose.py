"""Composing configs with Hydra, whose error messages are shortened to one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException, OverrideParseException

from conf.keys import check_argument, checked, unknown_key
from conf.schema import SCHEMAS, Config, register
from conf.values import as_typed, kind_of

CHECKED = "SPARSELLM_CHECKED"
"""The environment variable by which the launcher tells the ranks that it has already checked their arguments."""


def composed(config_name: str, overrides: Sequence[str]) -> Any:
    """Return the typed config `config_name` with `overrides` applied.

    Raises:
        ValueError: Hydra or the schema refuses an override; the message names the remedy.
    """
    register()
    schemas = schemas_of(config_name)
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return checked(compose(config_name, overrides=prepared(config_name, overrides)))
    except (HydraException, OSError) as error:
        raise ValueError(composition_sentence(error, *schemas)) from error


WANTED = {
    "Float": "a number", "Integer": "a whole number", "bool": "true or false", "ListConfig": "a list, [a,b]",
    "DictConfig": "a group of keys, {a:1,b:2}", "null": "a value, because it cannot be null",
}  # fmt: skip
"""The remedy for a value that OmegaConf cannot convert, by a word of its message."""


def choice_sentence(said: str) -> str | None:
    """Return the sentence about an unknown choice of a group; None if Hydra's message `said` is about something else."""
    found = re.search(r"Could not find '([\w/]+)/([^'/]+)' Available options in '[^']*': (.*)", said)
    if found is None:
        return None
    group, value, options = found[1], found[2], found[3].split()
    near = difflib.get_close_matches(value, options, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "choose one of"
    return f"{group}={value} is not known: {hint} {', '.join(options)}."


def type_sentence(said: str) -> str | None:
    """Return the sentence about a value of the wrong type; None if Hydra's message `said` is about something else."""
    if found := re.search(r"An item is already at '([\w.]+)'.*? prefix: '([^']*)'", said):
        return f"{found[2]} has the wrong type: give {WANTED['DictConfig']}."
    found = re.match(r"Error merging override \+*(\S+?=.*?) (Value |Invalid |Cannot merge|field )(.*)", said)
    if found is None:
        return None
    ends = {
        r"converted to (Float|Integer)": None, r"not a valid (bool)": None, r"not a (ListConfig)": None,
        r"with (ListConfig)": None, r"subclass of \w+Config": "DictConfig", r"not Optional": "null",
    }  # fmt: skip
    for pattern, word in ends.items():
        if match := re.search(pattern, found[3]):
            return f"{found[1]} has the wrong type: give {WANTED[word or match[1]]}."
    return None


def prepared(config_name: str, arguments: Sequence[str], is_sweep: bool = False) -> list[str]:
    """Return a command line in Hydra's grammar, after checking that each key is in the schema; text is taken as typed.

    If there are flags of Hydra (--cfg, --info, ...), Hydra checks the keys.
    """
    own = [folder_key(argument) for argument in arguments] if config_name in ("eval", "compact") else list(arguments)
    schemas = schemas_of(config_name)
    if not any(argument.startswith("-") for argument in own):
        for argument in own:
            check_argument(argument, *schemas)
    return [as_typed(argument, *schemas, is_sweep=is_sweep) for argument in own]


def schemas_of(config_name: str) -> tuple[Any, ...]:
    """Return the schema classes whose keys a command accepts."""
    if config_name == "plan":
        return (SCHEMAS["plan"], Config)
    return (Config,) if config_name == "train" else (SCHEMAS[config_name],)


def folder_key(argument: str) -> str:
    """Return model=DIR as folder=DIR, because for `model` Hydra would look for a config DIR in conf/model."""
    return f"folder={argument.removeprefix('model=')}" if argument.startswith("model=") else argument


def check_arguments(config_name: str, arguments: Sequence[str]) -> None:
    """Compose the config before Hydra does, so that a mistake is reported in one sentence; skip calls with Hydra's flags."""
    if not any(argument.startswith("-") for argument in arguments):
        composed(config_name, arguments)


def composition_sentence(error: Exception, *schemas: Any) -> str:
    """Return Hydra's message as one line, without search path and advice; for a mistyped key, name the nearest one."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read: quote text for Hydra and the shell, \"key='some text'\"; lists are [a,b], and "
            "a group of keys is {a:1,b:2}."
        )
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    lines = [line.strip() for part in (error, cause) for line in str(part).split("Config search path")[0].splitlines()]
    idle = ("See https", "full_key", "object_type", "reference_type", "To append")
    said = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(idle)))
    if sentence := choice_sentence(said) or type_sentence(said):
        return sentence
    path, key = re.search(r"Could not override '([\w.]+)'", said), re.search(r"Key '(\w+)' (?:is )?not in", said)
    if path is None and key is None:
        return said
    name = path[1] if path else key[1] if key else ""
    if path and key and path[1].rpartition(".")[2] != key[1]:
        name = f"{path[1]}.{key[1]}"
    if any(kind_of(name, schema) is Any for schema in schemas):
        return f"{name} is not set yet: add it with a plus, +{name}=VALUE."
    return unknown_key(said.rstrip("."), name, *schemas)
