"""The text of `python -m launch --help`: an overview, or with the name of a group its choices and keys."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from conf.schema import Config

CONF = Path(__file__).resolve().parent.parent / "conf"
USAGE = """\
One run on this machine's devices, or with -m a sweep:

  python -m launch experiment=demo [key=value ...]
  python -m launch -m experiment=demo sweep_name=levels sparsity.target=0,0.2,0.4,0.6,0.8
  python -m launch -m experiment=demo sweep=twin_pairs sweep_name=pairs
  python -m launch -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu experiment=sparsellm-1b-80p

  dry_run=true      print the accelerate command and stop
  --cfg job         print the whole configuration and stop
  --help GROUP      the choices and keys of one of the groups below

Paths and text are taken as typed, with ~ at the start of a path. With -m a comma separates values: quote one that has a
comma, "prompt='one, two'".

python -m launch.plan experiment=NAME tells what a run will cost. docs/clusters.md: several machines, SLURM, Kubernetes.
"""


def help_text(group: str | None = None) -> str:
    """Return the overview, or a group's choices and keys.

    Raises:
        ValueError: There is no such group.
    """
    groups = sorted(folder.relative_to(CONF).as_posix() for folder in [*CONF.glob("*/"), *CONF.glob("hydra/*/")])
    groups = [name for name in groups if list((CONF / name).glob("*.yaml"))]
    kinds = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
    known = list(dict.fromkeys([*groups, *kinds]))
    if group is None:
        lines = [f"  {name:18} {summary(name, kinds)}" for name in known]
        own = [line for line in key_lines(Config) if line.split()[0] not in kinds]
        return "\n".join([USAGE, "Groups:", *lines, "", "Keys of a run beside the groups':", *own])
    if group not in groups and group not in kinds:
        raise ValueError(
            f"--help {group}: there is no such group; choose one of {', '.join(dict.fromkeys([*groups, *kinds]))}."
        )
    lines = [f"{group}=CHOICE:", *choice_lines(CONF / group), ""] if group in groups else []
    if group in kinds:
        lines += [f"Keys, as {group}.KEY=VALUE:", *key_lines(kinds[group])]
    return "\n".join(lines).rstrip()


def summary(name: str, kinds: dict[str, Any]) -> str:
    choices = ", ".join(path.stem for path in sorted((CONF / name).glob("*.yaml")))
    return choices or (inspect.getdoc(kinds[name]) or "").splitlines()[0]


def choice_lines(folder: Path) -> list[str]:
    """Return a line for each yaml file of a folder: its name and its opening comment."""
    files = sorted(folder.glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    return [f"  {file.stem:{width}}  {opening(file)}" for file in files]


def opening(file: Path) -> str:
    """Return the opening comment of a yaml file, up to the first command in it."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#") or line.startswith("#  "):
            break
        words.append(line.removeprefix("#").strip())
    return " ".join(words).rstrip(":")


def key_lines(kind: Any) -> list[str]:
    """Return a line for each key of a config class: its name, its default and its docstring."""
    documents = dict(documented_keys(kind))
    hints = get_type_hints(kind)
    lines = []
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            continue
        default = f" = {text}" if (text := default_of(field)) else ""
        lines.append(f"  {field.name + default:40} {documents.get(field.name, '')}".rstrip())
        methods = kind.METHODS.get(field.name) if hasattr(kind, "METHODS") else None
        lines += [f"      {line}" for line in methods.help_lines()] if methods else []
    return lines


def documented_keys(kind: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, the docstring below it) for a dataclass, its base classes first."""
    bases: list[Any] = [base for base in kind.__mro__ if is_dataclass(base)]
    for base in reversed(bases):
        (body,) = (node.body for node in ast.parse(inspect.getsource(base)).body if isinstance(node, ast.ClassDef))
        for statement, below in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                yield statement.target.id, " ".join(ast.literal_eval(below.value).split())  # type: ignore[union-attr]


def default_of(field: Field[Any]) -> str:
    """Return a key's default as yaml writes it; an empty string for a required key, a list or a dictionary."""
    return "" if field.default is MISSING or field.default == "???" else _plain(field.default)


def _plain(value: Any) -> str:
    """Return a default as yaml writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)
