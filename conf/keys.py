"""Checks for the keys of a command line and of a composed config: each must exist and have a value; none may be removed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from conf.schema import Config
from conf.schema.checks import check
from conf.schema.passed_on import check_extra
from conf.values import NAME_LISTS, TEXT_LISTS, kind_of, split_at_commas

CONF = Path(__file__).parent
CHOOSERS = ("experiment", "sweep")
"""Config groups without a key in the config: their files set keys of other groups."""
NO_NAME = re.compile(r"true|false|[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)
"""Values that Hydra reads as something other than text."""
MAX_CHOICES = 12
"""The most choices that an error message lists."""


def check_argument(argument: str, *schemas: Any) -> None:
    """Raise a ValueError if an argument names no key, removes a key, or gives an empty value."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if name.replace("/", ".").split(".")[0] == "hydra" or "@" in name:
        return
    check(bool(name), f"{argument} names no key: write key=value{_example(name)}.")
    kind = next((found for schema in schemas if (found := kind_of(name, schema)) is not None), None)
    if kind is None and name not in CHOOSERS:
        check(
            bool(equals) or key.startswith("~"),
            f"{argument} sets nothing: write key=value{_example(name)}.",
        )
        raise ValueError(unknown_key(argument, name, *schemas))
    check(
        not key.startswith("~") or kind is Any,
        f"{argument} would remove {name}, which is required: give another value, {name}={_choices(name) or 'VALUE'}.",
    )
    check(bool(equals) or kind is Any, f"{argument} sets nothing: write {name}=VALUE.")
    is_empty = equals and not value.strip()
    if equals and not is_empty and (kind in TEXT_LISTS or name in NAME_LISTS):
        inner = value.strip().removeprefix("[").removesuffix("]")
        is_empty = bool(inner.strip()) and not all(piece.strip() for piece in split_at_commas(inner))
    is_group = is_dataclass(kind) or name in CHOOSERS
    check(value.strip() != "null" or not is_group, missing_value(name))
    check(
        not is_group or NO_NAME.fullmatch(value.strip()) is None,
        f"{argument} names no choice: give {name}={_choices(name) or 'NAME'}.",
    )
    check(not is_empty or key.startswith("~"), empty_value(name, value))


def unknown_key(argument: str, name: str, *schemas: Any) -> str:
    """Return the error for a key that does not exist; it names the nearest key."""
    paths = [path for schema in schemas for path in key_paths(schema)]
    last = {path.split(".")[-1]: path for path in paths}
    near = difflib.get_close_matches(name, [*paths, *CHOOSERS], n=1, cutoff=0.75)
    near = near or [last[word] for word in difflib.get_close_matches(name.split(".")[-1], last, n=1)]
    remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_top_keys(*schemas))}."
    return f"{argument}: there is no key {name}; {remedy}"


def empty_value(name: str, value: str = "") -> str:
    """Return the sentence about a key that was given no value."""
    return (
        f"{shown(name)}={value or chr(39) * 2} is empty: give a value, or leave the key out; a shell variable that is not "
        "set is empty."
    )


def missing_value(name: str) -> str:
    """Return the error for a key without a value; it names the possible values."""
    value = "DIR" if name in ("folder", "out") else _choices(name) or "VALUE"
    return f"{shown(name)} has no value: give {shown(name)}={value}."


def shown(name: str) -> str:
    """Return a key as the user types it: `folder` is typed as model=DIR."""
    return "model" if name == "folder" else name


def key_paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a config class, nested ones before their parents."""
    for key, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from key_paths(kind, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def checked(config: DictConfig) -> Any:
    """Return the dataclass of a composed config.

    Raises:
        ValueError: A key is not in the schema, or its value is missing or empty.
    """
    try:
        for path, name, schema in unknown_keys(config):
            raise ValueError(unknown_key("the configuration", f"{path}{name}", schema))
        built = OmegaConf.to_object(config)
        for path in empty_texts(config):
            raise ValueError(empty_value(path))
        if isinstance(built, Config):
            check_extra(built.trainer.extra)
    except MissingMandatoryValue as error:
        raise ValueError(missing_value(error.full_key or str(error).rsplit(" ", 1)[-1])) from error
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return built


def unknown_keys(config: DictConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield (prefix, key, class of the root) for each key that is not in the class of its node."""
    root = OmegaConf.get_type(config)
    for path, node in _nodes(config):
        schema = OmegaConf.get_type(node)
        if isinstance(node, DictConfig) and is_dataclass(schema):
            yield from ((path, str(key), root) for key in node if str(key) not in schema.__dataclass_fields__)


def empty_texts(config: DictConfig) -> Iterator[str]:
    """Yield the dotted name of each empty text, also inside lists."""
    for path, node in _nodes(config):
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            yield from (f"{path}{key!s}" for key in node if _is_empty(node, key))
        elif isinstance(node, ListConfig):
            yield from (path.rstrip(".") for index in range(len(node)) if _is_empty(node, index))


def _nodes(config: DictConfig | ListConfig, path: str = "") -> Iterator[tuple[str, DictConfig | ListConfig]]:
    yield path, config
    for key in list(config) if isinstance(config, DictConfig) else range(len(config)):
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_config(child := config[key]):
            yield from _nodes(child, f"{path}{key}.")


def _is_empty(node: Any, key: Any) -> bool:
    value = None if OmegaConf.is_missing(node, key) else node[key]
    return isinstance(value, str) and not value.strip()


def _choices(name: str) -> str:
    """Return the choices of a group as text: `a or b`."""
    names = sorted(path.stem for path in (CONF / name.replace(".", "/")).glob("*.yaml"))
    if len(names) > MAX_CHOICES:
        return "NAME"
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _example(name: str) -> str:
    """Return the text `, like group=name` if `name` is a choice of a group."""
    groups = sorted(path.parent.name for path in CONF.glob(f"*/{name}.yaml")) if name.replace("-", "").isalnum() else []
    return f", like {groups[0]}={name}" if groups else ", like experiment=demo"


def _top_keys(*schemas: Any) -> Sequence[str]:
    return [*dict.fromkeys(key for schema in schemas for key in get_type_hints(schema)), *CHOOSERS]
