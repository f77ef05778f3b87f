"""Completions of a command line: the commands, then the groups, choices and keys that the schema knows.

Hydra completes one script with one config. Here each command has its own, so the words come from the same classes that
check them. No torch is imported: a shell waits for the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from conf.compose import schemas_of
from conf.keys import CHOOSERS, CONF, key_paths
from launch.commands import COMMANDS

RUN_COMMANDS = ("train", "plan")
"""Configs that compose a run, and so also take the groups of conf/."""


def completions(words: Sequence[str]) -> list[str]:
    """Return the completions of the last of `words`.

    A key ends with `=`, a group with `.`, and a word that needs no more with a space.

    Args:
        words: The words of the command line after `sparsellm`: the command first, and last the word to complete.
    """
    *before, last = words or [""]
    if not before:
        names = [*COMMANDS, "completion", "--help"]
        return sorted(f"{name} " for name in names if name.startswith(last))
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    group, equals, choice = last.partition("=")
    if equals:
        return [f"{group}={name} " for name in choices(command.config, group) if name.startswith(choice)]
    keys = {path for schema in schemas_of(command.config) for path in key_paths(schema)}
    if command.config in RUN_COMMANDS:
        keys |= set(CHOOSERS)
    if command.config in ("eval", "compact"):
        # On the command line `folder` is called `model`.
        keys = (keys - {"folder"}) | {"model"}
    # One level at a time: `trainer.` opens the forty keys below it.
    depth = last.count(".")
    found = {_cut(key, depth) for key in keys if key.startswith(last)}
    # A group without yaml files has nothing to choose from: only its keys can be set.
    empty = {f"{key[:-1]}=" for key in found if key.endswith(".") and not choices(command.config, key[:-1])}
    return sorted(found - empty)


def choices(config: str, group: str) -> list[str]:
    """Return the names of a group's yaml files; none if the command takes no groups or the group has none."""
    if config not in RUN_COMMANDS and not (config == "eval" and group == "data"):
        return []
    return sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group.replace("/", "").isalnum() else []


def _cut(key: str, depth: int) -> str:
    """Return a key's first `depth + 1` names, with a dot if more follow and `=` if none do."""
    parts = key.split(".")
    return ".".join(parts[: depth + 1]) + ("." if len(parts) > depth + 1 else "=")
