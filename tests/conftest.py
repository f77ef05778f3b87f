"""An uninterrupted run that several test modules share, and the order in which modules run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.commands import run_command
from tests.interrupted import interrupted
from tests.tiny_run import write_text

SLOWEST = (
    "test_failures", "test_resume", "test_run", "test_callback", "test_initial", "test_methods", "test_bad_input",
    "test_errors", "test_benchmarks",
)  # fmt: skip
"""The modules that launch the most processes. They run first, so that two workers end together (`make test`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Make a folder for a text and the runs on it, which all workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "interrupted"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="session")
def whole(folder) -> Path:
    """Make the run of `interrupted`, but without an interruption."""
    with FileLock(f"{folder}.whole.lock"):
        if not (folder / "runs" / "whole" / "summary.json").exists():
            done = run_command(["launch", *interrupted(folder, "whole", "logger=none")])
            assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "whole"
