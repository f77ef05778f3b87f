"""The house of CONTRIBUTING.md: no import runs up, no two files need each other, and planning a run needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("sparsity", "conf", "train", "eval", "launch")
HOUSE = (
    "sparsity.common", "sparsity", "sparsity.select", "sparsity.event", "sparsity.masked", "sparsity.pruner", "sparsity.rules",
    "sparsity.resume", "sparsity.tracked", "sparsity.callback", "sparsity.compact", "conf",
    "train.plan", "train.distributed", "train.faults", "train.data", "train.checkpoints", "train.speed", "train.scoring",
    "train.model", "train.record", "train",
    "eval.model", "eval.runs", "eval",
    "launch",
)  # fmt: skip
"""The rooms, lowest first. A file belongs to the room with the longest name that fits, and imports only from it or lower."""
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in TOP
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def imported(module: str, source: str) -> Iterator[str]:
    """Yield our modules that `source` imports, even inside functions, but not those imported only for types."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively: write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in FILES and name != module)


def room(module: str) -> str:
    return max((name for name in HOUSE if f"{module}.".startswith(f"{name}.")), key=len)


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    floors = {name: floor for floor, name in enumerate(HOUSE)}
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if floors[room(other)] > floors[room(module)]
    ]


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return pairs of files that import each other, directly or through others."""
    reach = {module: reached(graph, module) for module in graph}
    return sorted(f"{one} and {other}" for one in reach for other in reach[one] if one < other and one in reach[other])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {module: set(imported(module, file.read_text(encoding="utf-8"))) for module, file in FILES.items()}


def test_no_import_runs_up(graph):
    assert arrows_up(graph) == []


def test_no_two_files_need_each_other(graph):
    assert circles(graph) == []


def test_an_import_inside_a_function_counts_and_one_for_types_does_not():
    lazy = "def f():\n    from launch import run\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from launch import run\n"
    assert (list(imported("train.run", lazy)), list(imported("train.run", typed))) == (["launch.run"], [])
    assert arrows_up({"train.run": {"launch.run"}}) == ["train.run imports launch.run"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a and b", "a and c", "b and c"]


def test_planning_a_run_and_the_schedules_import_no_torch():
    planning = [name for name in FILES if room(name) in ("train.plan", "sparsity.common")]
    modules = ["sparsity", "sparsity.schedule", "sparsity.window", "conf.schema", "conf.compose", *planning]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name); assert 'torch' not in sys.modules, name"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_constants_kept_where_torch_is_not_imported_are_those_of_the_modules_that_need_torch():
    from sparsity.compact import METHOD
    from sparsity.event.gradients import STATE
    from train.checkpoints.branch import DENSE_GRADIENT
    from train.plan.config_json import COMPACT

    assert (COMPACT, DENSE_GRADIENT) == (METHOD, STATE)
