"""python -m train.data: it turns text into tokens before a GPU is needed; shares give the same tokens as one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.schema import DataConfig
from tests.commands import run_command
from tests.tiny_run import tiny, write_text
from train.data import prepare
from train.data.__main__ import report_text
from train.data.shards import Shard, parse_shard, prepare_shard


def test_the_command_prepares_and_names_the_command_that_trains(tmp_path):
    write_text(tmp_path / "text.jsonl")
    command = ["train.data", *tiny(tmp_path)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "tokens to train on (" in lines[0]
    assert "held out" in lines[0]
    assert lines[-1] == f"train     python -m launch {' '.join(tiny(tmp_path))}"
    assert "tokenize" in done.stderr
    again = run_command(command)
    assert again.stdout == done.stdout
    assert "tokenize" not in again.stderr


def config(folder: Path, cache: str) -> DataConfig:
    return DataConfig(
        source="text", path=str(folder / "text"), heldout_share=0.1, num_workers=1, cache_dir=str(folder / cache)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for part in range(5):
        lines = [json.dumps({"text": f"{part} {number} " + "a few words more " * 8}) for number in range(40)]
        (tmp_path / "text" / f"{part}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_shares_in_any_order_come_to_what_one_process_makes(folder):
    whole = prepare(config(folder, "whole"), "train", 300, 32)
    first = prepare_shard(config(folder, "shared"), "train", 300, 32, Shard(2, 2))
    assert first.prepared is None
    assert (first.num_parts, first.num_waiting) == (5, 3)
    assert report_text(first, Shard(2, 2), [], {}).startswith(
        "shard 2/2 is done, but 3 of 5 parts are not: run the other shards"
    )
    last = prepare_shard(config(folder, "shared"), "train", 300, 32, Shard(1, 2))
    assert last.prepared is not None
    names = [Path(one.folder, "index.json").read_text() for one in (whole, last.prepared)]
    assert names[0] == names[1]
    again = prepare_shard(config(folder, "shared"), "train", 300, 32, Shard(2, 2))
    assert again.prepared == last.prepared


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"shard={text} is not a share of the text"):
        parse_shard(text)
