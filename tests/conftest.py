"""An uninterrupted run that several test modules share, the order in which modules run, and what no test leaves behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def no_precision_is_left() -> Iterator[None]:
    """Make each test's Trainer choose its mixed precision anew: accelerate keeps the first one of a process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


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
