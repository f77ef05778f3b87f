"""data=hub: a dataset by its name, tested on local folders in the hub's layout."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.compose import composed
from conf.schema import DataConfig
from train.data import PreparedData, dataset, fineweb, hub, prepare

README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def write_lines(file: Path, words: str, count: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": f"{words} {number} " * 9}) + "\n" for number in range(count))
    file.write_bytes(gzip.compress(lines.encode(), mtime=0))


@pytest.fixture
def c4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with C4's layout: subsets listed in a README, files of gzipped lines."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "c4"
    write_lines(folder / "en" / "c4-train.00000-of-00002.json.gz", "first", 40)
    write_lines(folder / "en" / "c4-train.00001-of-00002.json.gz", "second", 40)
    write_lines(folder / "en" / "c4-validation.00000-of-00001.json.gz", "validation", 30)
    write_lines(folder / "de" / "c4-train.00000-of-00001.json.gz", "german", 40)
    (folder / "README.md").write_text(README)
    return folder


def prepared(folder: Path, cache: Path, **changes: Any) -> PreparedData:
    settings = {
        "source": "hub", "name": str(folder), "heldout_share": 0.2, "num_workers": 1, "cache_dir": str(cache),
    }  # fmt: skip
    return prepare(DataConfig(**(settings | changes)), "train", 300, 16)


def num_documents(data: PreparedData) -> int:
    return data.train.num_documents + data.heldout.num_documents


def test_the_files_of_a_subset_and_split_are_read_in_place(c4, tmp_path):
    data = prepared(c4, tmp_path / "cache", subset="en")
    assert num_documents(data) == 80
    assert num_documents(prepared(c4, tmp_path / "cache", subset="en", split="validation")) == 30
    assert not (tmp_path / "cache" / "documents").exists()


def test_streamed_documents_are_those_of_the_files(c4, tmp_path):
    data = prepared(c4, tmp_path / "cache", subset="en", stream=True)
    assert num_documents(data) == 80
    assert data.train.num_tokens == prepared(c4, tmp_path / "cache", subset="en").train.num_tokens
    assert num_documents(prepared(c4, tmp_path / "cache", subset="en", stream=True, max_documents=50)) == 50


def test_a_copy_without_a_readme_has_its_subsets_as_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for subset, count in (("sample-10BT", 40), ("sample-100BT", 50)):
        file = tmp_path / "fineweb" / subset / "000_00000.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.table({"text": [f"{subset} {number} " * 9 for number in range(count)]}), file)
    assert num_documents(prepared(tmp_path / "fineweb", tmp_path / "cache", subset="sample-100BT")) == 50


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"subset": "fr"},
            r"data\.name=.*c4 data\.subset=fr cannot be read \(.*fr.*\): give one of its subsets and splits",
        ),
        (
            {"subset": "en", "split": "test"},
            "has no split test, only train, validation: give one of its splits in data.split",
        ),
    ],
)
def test_a_subset_or_split_that_there_is_not_is_refused(c4, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        prepared(c4, tmp_path / "cache", **changes)


def test_without_a_network_the_remedy_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(
        ValueError, match=r"data\.name=no/such cannot be read \(it does not answer\): connect to the network"
    ):
        prepared(Path("no/such"), tmp_path / "cache")


@pytest.mark.parametrize("name", ["c4", "fineweb", "dclm", "slimpajama"])
def test_well_known_datasets_have_yamls_of_their_own(name):
    config = composed("train", [f"data={name}"])
    assert config.data.source == "hub"
    assert "/" in str(config.data.name)
    assert composed("train", [f"data={name}", "data.name=/a/copy"]).data.name == "/a/copy"


def test_an_interrupted_stream_resumes_with_the_file_that_was_not_complete(c4, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "LINES_PER_FILE", 30)
    write = dataset.write_atomically

    def stop_at_two(path: Path, text: str) -> None:
        if path.name == "part-00002.jsonl":
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(dataset, "write_atomically", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        prepared(c4, tmp_path / "cache", subset="en", stream=True)
    written: list[str] = []
    monkeypatch.setattr(dataset, "write_atomically", lambda path, text: (written.append(path.name), write(path, text)))
    data = prepared(c4, tmp_path / "cache", subset="en", stream=True)
    assert [name for name in written if name.endswith("jsonl")] == ["part-00002.jsonl"]
    (folder,) = (tmp_path / "cache" / "documents").glob("*/")
    lines = [json.loads(line)["text"] for file in sorted(folder.iterdir()) for line in file.open()]
    expected = [f"{words} {number} " * 9 for words in ("first", "second") for number in range(40)]
    assert lines == expected
    assert num_documents(data) == 80


def test_rows_without_text_are_skipped_and_counted_while_streaming(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "own").mkdir()
    lines = [json.dumps({"text": f"row {number} " * 9 if number != 7 else None}) for number in range(60)]
    (tmp_path / "own" / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"data\.name=\S*own, row 7 has null as text: give a string"):
        prepared(tmp_path / "own", tmp_path / "cache", stream=True)
    assert num_documents(prepared(tmp_path / "own", tmp_path / "cache", stream=True, on_error="skip")) == 59
    assert "data.on_error=skip left out 1 document of hub" in capsys.readouterr().err


def test_a_split_that_is_missing_is_named_without_a_readme_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ValueError, match=r"has no split test, only train: give one of its splits in data\.split"):
        prepared(tmp_path / "own", tmp_path / "cache", split="test")


def test_fineweb_streamed_by_name_skips_rows_without_text_if_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    file = tmp_path / "copy" / "sample-10BT" / "000_00000.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": [None] + [f"row {number} " * 9 for number in range(59)]}), file)
    monkeypatch.setattr(fineweb, "REPOSITORY", str(tmp_path / "copy"))
    settings = {"source": "fineweb_edu", "name": None, "subset": "sample-10BT", "max_documents": 60}
    with pytest.raises(ValueError, match="row 0 "):
        prepared(tmp_path, tmp_path / "cache", **settings)
    assert num_documents(prepared(tmp_path, tmp_path / "cache", on_error="skip", **settings)) == 59
    assert "data.on_error=skip left out 1 document of fineweb_edu" in capsys.readouterr().err
