"""What several test modules look at: one run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import run_command
from tests.interrupted import interrupted
from tests.test_run import write_text


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="session")
def whole(folder) -> Path:
    """The run of `interrupted` that nothing happened to."""
    done = run_command(["launch", *interrupted(folder, "whole", "logger=none")])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "whole"
