"""docs/own_methods.md: its classes prune as the page says, and its commands find them."""

from __future__ import annotations

import re
import shlex

import pytest
from accelerate import PartialState

from sparsity import SparsityCallback
from tests.commands import ROOT, run_command
from tests.small_trainer import small_trainer

PAGE = (ROOT / "docs" / "own_methods.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [shlex.split(line)[2:] for line in PAGE.splitlines() if line.startswith("python -m ")]


def test_the_pages_classes_prune_each_block_alone_and_all_in_half_the_window(tmp_path):
    own: dict[str, type] = {}
    exec(CODE, own)
    schedule = own["Steep"](0.5, start_step=1, end_step=3, every_steps=1)
    assert [schedule.density(step) for step in range(4)] == pytest.approx([1, 1 - 1 / 3, 0.5, 0.5])
    callback = SparsityCallback(schedule, score=own["Momentum"](), scope=own["ByBlock"]())
    PartialState(cpu=True)
    small_trainer(tmp_path, sparsity=callback).train()
    kept: dict[str, list[int]] = {}
    for shard in callback.pruner.shards:
        words = shard.name.split(".")
        counts = kept.setdefault(words[words.index("layers") + 1] if "layers" in words else "rest", [0, 0])
        counts[0] += int(shard.mask.sum())
        counts[1] += shard.mask.numel()
    assert sorted(kept) == ["0", "1", "rest"]
    assert all(2 * own == numel for own, numel in kept.values())


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_the_pages_commands_find_the_methods(words, tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "module.py").write_text(CODE)
    done = run_command([*words, "dry_run=true"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_a_score_a_schedule_and_a_scope():
    assert [words[-1].partition("=")[0] for words in COMMANDS] == [
        "sparsity.score",
        "sparsity.schedule",
        "sparsity.scope",
    ]
