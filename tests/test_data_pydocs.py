"""Docstrings are read from files that are never imported, each completely and once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.data.corpus import pydocs_files
from train.data.pydocs import documents_of, find_sources

LONG = "Explains at some length what it does, so that the text is worth a document of its own in the corpus. "

MODULE = f'''
"""{LONG}module"""
raise RuntimeError("imported")

def function(a, /, b=1, *rest, c, **others):
    """{LONG}function

    Example:
        indented
    """

async def waits():
    """short"""

def _private():
    """{LONG}private"""

class Thing:
    """{LONG}class"""

    def __init__(self, x):
        """{LONG}init"""

    def silent(self):
        pass
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    files = {
        "site/alpha/__init__.py": MODULE,
        "site/alpha/copy.py": MODULE.replace("    ", "\t"),
        "site/alpha/tests/test_it.py": f'"""{LONG}test"""',
        "site/alpha/broken.py": "def (:",
        "site/alpha/null.py": "\0",
        "site/alpha/data/text.txt": "no python",
        "site/beta.py": f'"""{LONG}beta \\ud800 half a pair"""\ndef g():\n    "{LONG}g"\n',
        "site/train/__init__.py": f'"""{LONG}our own"""',
        "site/alpha-1.0.dist-info/x.py": f'"""{LONG}metadata"""',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path / "site"


def texts(files: list[Path]) -> list[str]:
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def test_a_document_is_headed_by_its_name_and_parameters() -> None:
    documents = dict(documents_of(MODULE.encode(), "alpha"))
    assert documents["alpha"] == f"{LONG}module"
    assert documents["alpha.function(a, b, *rest, c, **others)"] == f"{LONG}function\n\nExample:\n    indented"
    assert documents["class alpha.Thing"] == f"{LONG}class\n\n__init__(self, x)\n{LONG}init"
    assert documents["alpha.waits()"] == "short"
    assert not any("private" in heading for heading in documents)


def test_topics_of_the_language_reference_are_documents() -> None:
    code = b'topics = {"assert": "The assert statement\\n  is here", "if": "If"}'
    assert dict(documents_of(code, "pydoc_data.topics"))["if"] == "If"


def test_sources_leave_out_tests_metadata_and_our_own_packages(site: Path) -> None:
    modules = [source.module for source in find_sources([site])]
    assert modules == ["alpha", "alpha.broken", "alpha.copy", "alpha.null", "beta"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_copies_short_and_broken_docstrings_are_dropped(site: Path, tmp_path: Path, num_workers: int) -> None:
    _, files = pydocs_files([site], tmp_path / "cache", num_workers)
    headings = [text.split("\n")[0] for text in texts(files)]
    assert headings == ["alpha", "alpha.function(a, b, *rest, c, **others)", "class alpha.Thing", "beta.g()"]


def test_the_key_changes_with_one_byte_and_not_with_the_folder(site: Path, tmp_path: Path) -> None:
    key, files = pydocs_files([site], tmp_path / "cache", 1)
    moved = site.rename(tmp_path / "moved")
    assert pydocs_files([moved], tmp_path / "cache", 1) == (key, files)
    (moved / "beta.py").write_text((moved / "beta.py").read_text().replace("what", "that"))
    assert pydocs_files([moved], tmp_path / "cache", 1)[0] != key
