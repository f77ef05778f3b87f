"""Docstrings as a corpus: English with code, the same on every machine that has the same packages installed.

Files are parsed, never imported. A document is the docstring of a module or of a public function, or that of a public
class together with those of its methods. It begins with the object's name and parameters.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from train.data.pool import parallel

FORMAT = 1
"""A part of the corpus's key. Increase it when a change of code makes other documents from the same files."""
MIN_CHARACTERS = 100
PART_BYTES = 1 << 20
CHUNK_BYTES = 2 << 20
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
OWN_PACKAGES = frozenset({"conf", "eval", "launch", "sparsity", "train"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A Python file and the dotted name under which it is imported."""

    path: str
    module: str
    num_bytes: int


def default_roots() -> tuple[str, ...]:
    """Return the standard library's folder and the environment's site-packages."""
    paths = sysconfig.get_paths()
    return tuple(dict.fromkeys(os.path.realpath(paths[key]) for key in ("stdlib", "purelib", "platlib")))


def find_sources(roots: Iterable[str | Path]) -> list[Source]:
    """Return the Python files of all modules and packages below the roots, sorted by root and dotted name."""
    return [source for root in roots for source in sorted(_walk(str(root), ""), key=lambda source: source.module)]


def _walk(folder: str, package: str) -> Iterator[Source]:
    waiting = [(folder, package)]
    while waiting:
        folder, package = waiting.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, dot, suffix = entry.name.partition(".")
                if not stem.isidentifier() or (not package and stem in OWN_PACKAGES):
                    continue
                if suffix == "py" and entry.is_file():
                    module = package if stem == "__init__" else f"{package}.{stem}".lstrip(".")
                    yield Source(entry.path, module, entry.stat().st_size)
                elif not dot and entry.name not in SKIPPED_FOLDERS and entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{package}.{stem}".lstrip(".")))


def documents_of(code: bytes, module: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, body) of each docstring in a module's source; nothing if the source does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield module, _docstring(tree)
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and node.name.startswith("_"):
            continue
        if isinstance(node, Function):
            yield f"{module}.{_signature(node)}", _docstring(node)
        elif isinstance(node, ast.ClassDef):
            yield f"class {module}.{node.name}", _class_body(node)
        elif module == "pydoc_data.topics" and isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield name, inspect.cleandoc(text)


def _class_body(node: ast.ClassDef) -> str:
    methods = [method for method in node.body if isinstance(method, Function) and ast.get_docstring(method)]
    return "\n\n".join([_docstring(node), *(f"{_signature(method)}\n{_docstring(method)}" for method in methods)])


def _docstring(node: ast.Module | ast.ClassDef | Function) -> str:
    return ast.get_docstring(node, clean=True) or ""


def _signature(node: Function) -> str:
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"{node.name}({', '.join(names)})"


def _parse(sources: Sequence[Source]) -> list[tuple[str, str]]:
    return [
        (heading, body)
        for source in sources
        for heading, body in documents_of(Path(source.path).read_bytes(), source.module)
        if len(body) >= MIN_CHARACTERS and _is_unicode(body)
    ]


def _is_unicode(text: str) -> bool:
    """Return False if an escape in a docstring makes half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_documents(sources: Sequence[Source], folder: Path, num_workers: int | None = None) -> None:
    """Write the documents of the sources to `folder` as part-00000.jsonl, ... of about a megabyte each.

    A body that repeats an earlier one, apart from white space, is dropped, because packages ship copies of each other.

    Args:
        sources: The Python files.
        folder: The folder to write to.
        num_workers: The number of processes; None for all cores.
    """
    chunks, sizes = [[]], [0]  # type: list[list[Source]], list[int]
    for source in sources:
        if sizes[-1] >= CHUNK_BYTES:
            chunks.append([])
            sizes.append(0)
        chunks[-1].append(source)
        sizes[-1] += source.num_bytes
    parsed = parallel(_parse, chunks, label="parse docstrings", num_workers=num_workers, sizes=sizes)

    seen: set[bytes] = set()
    lines: list[str] = []
    num_parts = num_bytes = 0
    for heading, body in (document for chunk in parsed for document in chunk):
        digest = blake2b(" ".join(body.split()).encode(), digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        lines.append(json.dumps({"text": f"{heading}\n\n{body.strip()}\n"}, ensure_ascii=False))
        num_bytes += len(body)
        if num_bytes >= PART_BYTES:
            _write_part(folder, num_parts, lines)
            lines, num_bytes, num_parts = [], 0, num_parts + 1
    if lines:
        _write_part(folder, num_parts, lines)


def _write_part(folder: Path, index: int, lines: list[str]) -> None:
    (folder / f"part-{index:05}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
