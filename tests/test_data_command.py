"""python -m train.data: it turns text into tokens before a GPU is needed; shares give the same tokens as one process."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from conf.schema import DataConfig
from tests.commands import run_command
from tests.tiny_run import tiny, write_text
from train.data import prepare
from train.data.__main__ import main, report_text
from train.data.shards import Shard, parse_shard, prepare_shard


def test_the_command_prepares_and_names_the_command_that_trains(tmp_path):
    own = tmp_path / "my text, größe"
    own.mkdir()
    write_text(own / "text.jsonl")
    command = ["train.data", *tiny(own)]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "tokens to train on (" in lines[0]
    assert "held out" in lines[0]
    assert lines[-1] == f"train     python -m launch {shlex.join(tiny(own))}"
    assert "tokenize" in done.stderr
    again = run_command(command)
    assert again.stdout == done.stdout
    assert "tokenize" not in again.stderr
    trained = run_command([*shlex.split(lines[-1])[3:], "logger=none", "trainer.max_steps=4"])
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "tokenize" not in trained.stderr


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


@pytest.mark.parametrize("arguments", [[], ["shard=1/2"]])
def test_without_a_run_nothing_begins_and_the_remedy_is_told(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "no run was given: give experiment=NAME, or data=text data.path=FILE, or --help" in capsys.readouterr().err


def test_held_out_sets_are_prepared_with_the_text(folder, capsys):
    (folder / "val.jsonl").write_text(
        "".join(json.dumps({"text": f"val {number} " * 9}) + "\n" for number in range(30))
    )
    own = [f"data.path={folder}/text", "data.heldout_share=0.1", f"data.cache_dir={folder}/cache", "data.num_workers=1"]
    arguments = ["data=text", *own, "model.vocab_size=300", "data.sequence_length=32"]
    main([*arguments, f"eval.sets=[{{path:{folder}/val.jsonl}}]"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("val"))
    assert "tokens (30 documents, " in line
    assert line.endswith("only scored")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("{folder}/text/3.jsonl", "eval.sets: 3 reads {folder}/text/3.jsonl, which the run trains on"),
        ("{folder}/link.jsonl", "eval.sets: link reads {folder}/text/0.jsonl, which the run trains on"),
        ("{folder}/gone.jsonl", "data.path={folder}/gone.jsonl does not exist"),
    ],
)
def test_a_held_out_set_that_is_trained_on_or_missing_is_refused_before_the_text_is_read(folder, capsys, asked, words):
    (folder / "link.jsonl").symlink_to(folder / "text" / "0.jsonl")
    with pytest.raises(SystemExit):
        main(
            ["data=text", f"data.path={folder}/text", f"data.cache_dir={folder}/cache",
             f"eval.sets=[{{path:{asked.format(folder=folder)}}}]"]
        )  # fmt: skip
    assert words.format(folder=folder) in capsys.readouterr().err
    assert not (folder / "cache" / "tokens").exists()


def test_a_partial_file_of_another_process_is_left_alone_and_an_old_one_is_removed(folder):
    prepare(config(folder, "cache"), "train", 300, 32)
    (tokens,) = (folder / "cache" / "tokens").glob("*/")
    (tokens / "index.json").unlink()
    for name in (".young.partial", ".old.partial"):
        (tokens / name).touch()
    os.utime(tokens / ".old.partial", (1, 1))
    prepare(config(folder, "cache"), "train", 300, 32)
    assert [file.name for file in tokens.glob(".*.partial")] == [".young.partial"]


def test_a_cache_that_cannot_be_made_is_named_at_once(folder):
    (folder / "file").touch()
    with pytest.raises(
        ValueError, match=r"data\.cache_dir=\S*file/cache cannot be made \(Not a directory\): give a folder"
    ):
        prepare(config(folder, "file/cache"), "train", 300, 32)
