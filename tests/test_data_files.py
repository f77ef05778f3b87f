"""Files of the cache are complete or absent, and their content is hashed once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from sparsity.common.files import aside
from train.data import files
from train.data.files import build_once, sha256_of_all


def test_a_file_written_aside_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with aside(tmp_path / "a") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with aside(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "whole")]


def test_a_folder_is_built_once_and_not_left_half_built(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "a", fail)
    assert not (tmp_path / "a").exists()
    build_once(tmp_path / "a", lambda folder: (folder / "whole").touch())
    assert [file.name for file in build_once(tmp_path / "a", fail).iterdir()] == ["whole"]


def test_a_large_file_is_hashed_again_only_when_it_was_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = files.sha256_of

    def counted(path: str) -> str:
        hashed.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(files, "sha256_of", counted)
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    (tmp_path / "small").write_text("abc")
    (tmp_path / "large").write_text("abcdef")
    paths, memo = [tmp_path / "small", tmp_path / "large"], tmp_path / "memo" / "sha256.json"
    first = sha256_of_all(paths, memo, least_remembered=4)
    assert sha256_of_all(paths, memo, least_remembered=4) == first
    assert sorted(hashed) == ["large", "small", "small"]
    (tmp_path / "large").write_text("abcdeg")
    os.utime(tmp_path / "large", ns=(0, 0))
    assert sha256_of_all(paths, memo, least_remembered=4)[1] != first[1]


def test_the_memo_keeps_one_hash_a_file_and_those_of_other_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    one, other, memo = tmp_path / "one with spaces", tmp_path / "other", tmp_path / "sha256.json"
    one.write_text("a")
    other.write_text("b")
    hashes = sha256_of_all([one], memo, least_remembered=0) + sha256_of_all([other], memo, least_remembered=0)
    assert list(json.loads(memo.read_text()).values()) == hashes
    one.write_text("ab")
    changed = sha256_of_all([one, one], memo, least_remembered=0)
    assert changed == [hashlib.sha256(b"ab").hexdigest()] * 2
    assert sorted(json.loads(memo.read_text()).values()) == sorted([changed[0], hashes[1]])


@pytest.mark.parametrize("text", ['{"/a 1 2 3', "[]", "null", '"x"'])
def test_a_memo_that_is_none_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    (tmp_path / "a").write_text("a")
    memo = tmp_path / "sha256.json"
    memo.write_text(text)
    assert sha256_of_all([tmp_path / "a"], memo, least_remembered=0) == [hashlib.sha256(b"a").hexdigest()]
    assert len(json.loads(memo.read_text())) == 1


def test_a_file_touched_just_now_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    sha256_of_all([tmp_path / "a"], tmp_path / "sha256.json", least_remembered=0)
    assert not (tmp_path / "sha256.json").exists()


def test_hashes_do_without_a_memo_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    (tmp_path / "a").write_text("a")
    (tmp_path / "file").touch()
    memo = tmp_path / "file" / "sha256.json"
    assert sha256_of_all([tmp_path / "a"], memo, least_remembered=0) == [hashlib.sha256(b"a").hexdigest()]


def test_a_path_through_a_link_and_back_is_the_file_that_the_system_finds(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "far" / "text").write_text("right")
    (tmp_path / "text").write_text("wrong")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert sha256_of_all([tmp_path / "link" / ".." / "text"]) == [hashlib.sha256(b"right").hexdigest()]
