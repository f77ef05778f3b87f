"""Every name that a file imports from this project exists, also where the import is inside a function that few tests call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("sparsity", "conf", "train", "eval", "launch", "examples", "tests")
TREES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(file.read_text())
    for folder in TOP
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements define at the top of a module."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        else:
            yield from (
                one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
            )
            for field in ("body", "orelse", "finalbody"):
                yield from defined(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from defined(handler.body)


def missing(trees: dict[str, ast.Module]) -> list[str]:
    """Return `FILE: MODULE has no NAME` for each import of a name that is neither defined there nor a module."""
    names = {module: set(defined(tree.body)) for module, tree in trees.items()}
    return [
        f"{importer}: {node.module} has no {alias.name}"
        for importer, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] in TOP
        for alias in node.names
        if alias.name not in names.get(node.module, set()) and f"{node.module}.{alias.name}" not in trees
    ]


def test_every_name_that_a_file_imports_from_this_project_exists():
    assert missing(TREES) == []


def test_a_name_that_has_moved_is_named_with_its_importer():
    trees = {
        "train.a": "try:\n    x = 1\nexcept OSError:\n    y = 2\n",
        "tests.b": "def f():\n    from train.a import x, y, z\n",
    }
    assert missing({name: ast.parse(text) for name, text in trees.items()}) == ["tests.b: train.a has no z"]
