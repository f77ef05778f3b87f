"""The kinds of files that users have, a field given by its path, and documents that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import DataConfig
from train.data import prepare
from train.data.documents import read_documents
from train.data.index import read_index
from train.data.parts import cut_files, find_files
from train.data.skipped import Skipped

TEXTS = ["one, two", 'a "quoted"\nline', "größe 你好"]


def read(path: Path, text_field: str = "text", skipped: Skipped | None = None) -> list[str]:
    return [text for part in cut_files(find_files(path)) for text in read_documents(part, text_field, skipped)]


def lines(field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in TEXTS).encode()


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize("kind", [".jsonl.zst", ".jsonl.zstd", ".json.zst"])
def test_zstd_is_read_also_in_several_frames(tmp_path, kind):
    data = lines()
    frames = zstd(data[:20]) + zstd(data[20:])
    (tmp_path / f"a{kind}").write_bytes(frames)
    assert read(tmp_path / f"a{kind}") == TEXTS
    (tmp_path / f"b{kind}").write_bytes(zstd(data)[:-5])
    with pytest.raises(ValueError, match="is not a complete zstd file"):
        read(tmp_path / f"b{kind}")


def test_json_gz_holds_lines_of_json(tmp_path):
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines()))
    assert read(tmp_path) == TEXTS


def test_csv_is_read_by_its_columns(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "text"], *([str(number), text] for number, text in enumerate(TEXTS))])
    assert read(tmp_path / "a.csv") == TEXTS
    with pytest.raises(ValueError, match=r"a\.csv has no column body in its first line, only id, text"):
        read(tmp_path / "a.csv", "body")
    (tmp_path / "b.csv").write_text("id,text\n1,good\n2\n3,better\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 3 has 1 columns, so none for text"):
        read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text('id,text\n1,"never ends\n')
    with pytest.raises(ValueError, match=r"c\.csv, line 2 is not CSV"):
        read(tmp_path / "c.csv")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_is_named_by_its_path(tmp_path, kind):
    rows: list[dict[str, Any]] = [{"meta": {"text": text, "id": 1}} for text in TEXTS]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert read(path, "meta.text") == TEXTS
    with pytest.raises(ValueError, match=r"meta\.body"):
        read(path, "meta.body")
    if kind == "jsonl":
        path.write_text('{"meta.text": "plain", "meta": {"text": "nested"}}\n')
        assert read(path, "meta.text") == ["plain"]


def test_documents_that_cannot_be_read_are_counted_and_the_first_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\nnonsense\n{"text": 3}\n{"no": 1}\n{"text": "better"}\n\xff\n' + b"{}\n" * 9
    )
    skipped = Skipped()
    assert read(tmp_path / "a.jsonl", skipped=skipped) == ["good", "better"]
    assert skipped.count == 13
    assert [words.partition("line ")[2][:2] for words in skipped.first] == ["2 ", "3 ", "4 ", "6 ", "7 "]
    pq.write_table(pa.table({"text": ["good", None, "better"]}), tmp_path / "b.parquet")
    skipped = Skipped()
    assert read(tmp_path / "b.parquet", skipped=skipped) == ["good", "better"]
    assert (skipped.count, "row 1 has null" in skipped.first[0]) == (1, True)
    (tmp_path / "c.txt").write_bytes(b"\xff" * 100)
    skipped = Skipped()
    assert read(tmp_path / "c.txt", skipped=skipped) == []
    assert skipped.count == 1


def test_a_damaged_file_is_read_as_far_as_it_goes(tmp_path):
    data = b"".join(json.dumps({"text": f"{number} " * 50}).encode() + b"\n" for number in range(20_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data)[:-40_000])
    skipped = Skipped()
    assert len(read(tmp_path / "a.jsonl.gz", skipped=skipped)) > 100
    assert skipped.count == 1
    assert "is not a complete gzip file" in skipped.first[0]


def test_skipping_is_asked_for_told_and_kept_in_the_index(tmp_path, capsys):
    good = [json.dumps({"text": f"document {number} " * 9}) for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, "nonsense"]))
    settings: dict[str, Any] = {
        "source": "text", "path": str(tmp_path / "a.jsonl"), "heldout_share": 0.2, "num_workers": 1,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"a\.jsonl, line 61 is not JSON"):
        prepare(DataConfig(**settings), "train", 300, 16)
    data = prepare(DataConfig(**settings, on_error="skip"), "train", 300, 16)
    assert data.train.num_documents + data.heldout.num_documents == 60
    assert read_index(data.folder)["skipped"]["count"] == 1
    words = capsys.readouterr().err
    assert "data.on_error=skip left out 1 document of text, the first:" in words
    assert "a.jsonl, line 61 is not JSON" in words
