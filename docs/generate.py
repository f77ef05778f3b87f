"""Hooks of the documentation site: pages generated from the code, and links to files that are only in the repository.

Commands, configuration and Python API are documented in the code. Their pages are generated from it, so that they are never
out of date.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, write in {"commands.md": commands_page, "config.md": config_page, "api.md": api_page}.items():
        files.append(File.generated(config, name, content=write()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show a link to a file of the repository as its path, because the site contains only documents."""
    return LINK.sub(lambda found: _site_link(found, Path(config["docs_dir"])), markdown)


def _site_link(found: re.Match[str], docs: Path) -> str:
    words, target = found[1], found[2]
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    if target.startswith("../") or (docs / target).is_dir():
        path = (docs / target).resolve().relative_to(ROOT).as_posix()
        return words if words.strip("`/") in path else f"{words} (`{path}`)"
    return found[0]


def commands_page() -> str:
    """Return the page of all commands: the output of `sparsellm --help` and of each command's help."""
    from launch.console import COMMANDS, usage

    parts = [
        "# Commands", "What each command prints with `--help`. `sparsellm launch ...` and `python -m launch ...` are the same.",
        _block(usage()),
    ]  # fmt: skip
    for name, command in COMMANDS.items():
        parts += [
            f"## sparsellm {name}",
            f"{command.summary}: `python -m {command.module}`.",
            _block(_help_of(command.module)),
        ]
    return "\n\n".join(parts) + "\n"


def _help_of(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(f"python -m {module} --help failed: {done.stderr.strip()[-500:]}")
    return done.stdout.rstrip()


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def config_page() -> str:
    """Return the page of all configuration keys, made from the dataclasses that check them."""
    from conf.schema import SCHEMAS, Config

    kinds = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
    parts = [
        "# Configuration",
        "Every key of a run, with its type and default. On the command line a key of a group is `group.key=value`, and "
        "`group=choice` takes one of the yaml files in `conf/group/`. A key that does not exist is an error that names the "
        "nearest one.",
        "## A run", _table(Config, ""),
    ]  # fmt: skip
    for name, kind in kinds.items():
        parts += [f"## {name}", inspect.getdoc(kind) or "", _choices(name), *_tables(kind, f"{name}.")]
    parts += ["# Other commands"]
    for kind in SCHEMAS.values():
        if kind is not Config:
            parts += [f"## {kind.__name__}", inspect.getdoc(kind) or "", *_tables(kind, "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _choices(group: str) -> str:
    from launch.help import opening

    found = sorted((ROOT / "conf" / group).glob("*.yaml"))
    return "\n".join(f"- `{group}={path.stem}`: {opening(path)}" for path in found)


def _tables(kind: Any, prefix: str) -> list[str]:
    """Return a class's table and those of the classes in it."""
    inner = [(name, type_) for name, type_ in get_type_hints(kind).items() if is_dataclass(type_)]
    tables = [_table(kind, prefix)]
    for name, type_ in inner:
        tables += [f"### {prefix}{name}", inspect.getdoc(type_) or "", *_tables(type_, f"{prefix}{name}.")]
    return tables


def _table(kind: Any, prefix: str) -> str:
    from launch.help import default_of, documented_keys

    documents, hints = dict(documented_keys(kind)), get_type_hints(kind)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            continue
        words, default = documents.get(field.name, "").replace("|", "\\|"), default_of(field)
        rows.append(f"| `{prefix}{field.name}` | `{field.type}` | {default and f'`{default}`'} | {words} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def api_page() -> str:
    """Return the page of the public names of `sparsity`, each documented from its docstring."""
    import sparsity

    parts = [
        "# Python API",
        "What `from sparsity import ...` gives. The package needs torch and transformers, and nothing else of this project.",
    ]
    parts += [f"::: {sparsity._HOMES[name]}.{name}" for name in sparsity.__all__]
    parts += [
        "## Compact folders",
        "What `from sparsity.compact import ...` gives; [the format](format.md) has a page of its own.",
    ]
    parts += [
        f"::: sparsity.compact.{home}"
        for home in ("folder.compact_folder", "folder.expand_folder", "replacement.sparse_linears_")
    ]
    return "\n\n".join(parts) + "\n"
