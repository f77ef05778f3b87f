"""The umask determines the mode of every file and folder of a run, so that a group can share them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsity.compact import compact_folder, expand_folder
from tests.commands import run_command
from tests.test_run import tiny, write_text

SAVED = (
    "trainer.save_strategy=steps",
    "trainer.save_steps=4",
    "trainer.max_steps=8",
    "sparsity.window={start:2,end:6}",
)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the umask, which commands started inside inherit."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes_below(folder: Path) -> dict[str, str]:
    """Return the mode of each file and folder that is not a link, by relative name."""
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in found}


@pytest.mark.parametrize("mask", [0o022, 0o027], ids=oct)
def test_a_finished_run_its_cache_and_its_compact_form_have_the_umasks_modes(tmp_path, mask):
    with umask(mask):
        write_text(tmp_path / "text.jsonl")
        done = run_command(["launch", *tiny(tmp_path, *SAVED)])
        assert done.returncode == 0, done.stderr[-3000:]
        model = tmp_path / "runs" / "tiny" / "model"
        compact_folder(model, tmp_path / "compact")
        expand_folder(tmp_path / "compact", tmp_path / "expanded")
    modes = modes_below(tmp_path)
    for name in ("model/model.safetensors", "model/tokenizer.json", "summary.json", "metrics.jsonl", "report.png"):
        assert f"runs/tiny/{name}" in modes
    for pattern in ("cache/tokenizers/*/tokenizer.json", "cache/tokens/*/index.json", "runs/tiny/checkpoints/*/*"):
        assert list(tmp_path.glob(pattern)), pattern
    expected = {name: oct((0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask) for name in modes}
    assert modes == expected
