"""The commands of docs/data.md, run as written, on small files with the names that the page uses."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conf.compose import composed
from tests.small_models import gpt2, saved
from tests.test_data_foreign import write_megatron
from train.data.__main__ import main

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
COMMANDS = [line for line in PAGE.read_text().splitlines() if line.startswith("python -m ")]
PREPARED = [line.removeprefix("python -m train.data ") for line in COMMANDS if line.startswith("python -m train.data")]
SMALL = [
    "model.vocab_size=300",
    "data.sequence_length=16",
    "data.num_workers=1",
    "data.heldout_share=0.2",
    "data.cache_dir=cache",
]


def words(command: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', command)]


def lines(name: str, count: int = 60) -> bytes:
    texts = [f"{name} {number} " * 9 for number in range(count)]
    return "".join(json.dumps({"text": text, "meta": {"text": text}}) + "\n" for text in texts).encode()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with all files that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for folder in ("corpus", "code", "megatron", "allenai/c4/en"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "corpus" / "a.jsonl").write_bytes(lines("own"))
    (tmp_path / "code" / "a.jsonl").write_bytes(lines("code"))
    (tmp_path / "web.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines("web"), asbytes=True))
    (tmp_path / "allenai" / "c4" / "en" / "c4-train.json.gz").write_bytes(gzip.compress(lines("c4", 90)))
    saved(gpt2(), tmp_path / "tokenizer")
    write_megatron(tmp_path / "megatron")
    return tmp_path


@pytest.mark.parametrize("command", [command for command in PREPARED if "experiment" not in command])
def test_each_command_prepares_its_text(here, command, capsys):
    main([*words(command), *SMALL])
    told = capsys.readouterr().out.splitlines()
    assert "tokens to train on" in told[0]
    assert told[-1].startswith("train     python -m launch ")


def test_a_mixture_of_seven_to_three_is_that_in_its_blocks(here):
    from train.data import prepare
    from train.data.mixture import mixture_blocks

    (command,) = (command for command in PREPARED if "mixture" in command)
    config = composed("train", [*words(command), *SMALL])
    data = prepare(config.data, "train", 300, 16)
    blocks = mixture_blocks(data, 2000, seed=0)
    sources = np.array([blocks.order.source_at(place)[0] for place in range(2000)])
    assert [np.bincount(part).tolist() for part in (sources[:1000], sources[1000:])] == [[700, 300]] * 2


@pytest.mark.parametrize("command", [command for command in COMMANDS if "experiment=NAME" in command])
def test_the_commands_for_a_run_are_taken(command):
    asked = [word.replace("NAME", "demo") for word in words(command)[3:] if not word.startswith("shard=")]
    assert composed("train", asked).run_name == "demo"
