"""Every kind of file gives the same documents, in parts or whole, and bad input is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.corpus import content_key, left_out
from train.data.documents import DOCUMENT_BYTES, limit_parts, read_documents
from train.data.parts import cut_file, cut_files, find_files, text_cuts
from train.data.split import is_heldout

TEXTS = [f"document {index}: größe 你好\nline two\r\nend" for index in range(50)]


def read(path: Path, part_bytes: int = 1 << 20, text_field: str = "text") -> list[str]:
    return [text for part in cut_file(path, part_bytes) for text in read_documents(part, text_field)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS, "id": range(50)}), tmp_path / "a.parquet", row_group_size=7)
    return tmp_path / "a.parquet"


def test_jsonl_gzip_and_parquet_give_the_same_documents(tmp_path: Path, parquet: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == read(parquet) == TEXTS


@pytest.mark.parametrize("part_bytes", [1, 100, 1000])
def test_parts_together_are_the_file(tmp_path: Path, parquet: Path, part_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS).rstrip(b"\n"))
    assert len(cut_file(tmp_path / "a.jsonl", part_bytes)) > 1
    assert len(cut_file(parquet, part_bytes)) > 1
    assert read(tmp_path / "a.jsonl", part_bytes) == read(parquet, part_bytes) == TEXTS


def test_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"paragraph {index} über alles\n" * 3 + "\n" for index in range(3000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    for part_bytes in (100_000, 1 << 20):
        documents = read(tmp_path / "a.txt", part_bytes)
        assert "".join(documents) == text
        assert all(document.endswith("\n\n") for document in documents)
        assert max(len(document.encode()) for document in documents) <= 2 * DOCUMENT_BYTES
        assert len(documents) > 10


@pytest.mark.parametrize("unit", ["ä", "word ", "line\n", "你"])
def test_text_without_blank_lines_is_cut_inside_no_character(unit: str) -> None:
    data = (unit * 1000).encode()
    stops = list(text_cuts(data, 100))
    pieces = [data[start:stop].decode() for start, stop in zip([0, *stops], stops, strict=False)]
    assert "".join(pieces) == unit * 1000
    assert all(len(piece.encode()) <= 200 for piece in pieces)


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/1.txt", "a.jsonl", "b/0.parquet", "c.jsonl.gz", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in find_files(tmp_path)] == [
        "a.jsonl",
        "b/0.parquet",
        "b/1.txt",
        "c.jsonl.gz",
    ]


def test_max_documents_are_the_first_ones_over_all_files(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jsonl").write_bytes(jsonl(TEXTS[10 * index : 10 * index + 10]))
    parts = limit_parts(cut_files(find_files(tmp_path)), "text", 25)
    assert [text for part in parts for text in read_documents(part, "text")] == TEXTS[:25]


def test_empty_documents_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": ""}\n  \n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["x"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    marked = "\ufeff".encode()
    long = ("word " * 1000 + "\n\n") * 20
    (tmp_path / "a.txt").write_bytes(marked + long.encode())
    documents = read(tmp_path / "a.txt")
    assert len(documents) > 1
    assert "".join(documents) == long
    # Files that were concatenated still have their byte order marks.
    (tmp_path / "a.jsonl").write_bytes(2 * (marked + jsonl(["x"])))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(marked + jsonl(["x"])))
    (tmp_path / "b.txt").write_bytes(marked)
    assert read(tmp_path / "a.jsonl") == ["x", "x"]
    assert read(tmp_path / "a.jsonl.gz") == ["x"]
    assert read(tmp_path / "b.txt") == []


@pytest.mark.parametrize("digits", [5_000, 500_000])
def test_a_number_of_any_length_is_passed_over(tmp_path: Path, digits: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": -' + b"9" * digits + b', "text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == ["x"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["one", "größe"], pa.large_string()),
        pa.array(["one", "größe"], pa.string_view()),
        pa.array(["one", "größe"]).dictionary_encode(),
        pa.array([b"one", "größe".encode()]),
        pa.array([b"one", "größe".encode()], pa.large_binary()),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_text_in_every_type_of_column_is_read(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["one", "größe"]


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", GOOD + b"{oops\n", r"a\.jsonl, line 2 is not JSON \(.*\): give one JSON object a line"),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', r"line 2 has no field text but the fields body, id: "),
        ("a.jsonl", GOOD + b'["text"]\n', r"line 2 has no field text but a list: "),
        ("a.jsonl", GOOD + b'{"text": 3}\n', r"line 2 has a number as text: give a string in data\.text_field=text"),
        ("a.jsonl", GOOD + b'{"text": null}\n', r"line 2 has null as text"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"line 2 is not UTF-8: convert"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"line 2 has half a surrogate pair"),
        (
            "a.jsonl",
            GOOD + b'{"text": "a\0b"}\n',
            r"line 2 is not JSON \(Invalid control character, character 12 of it\)",
        ),
        ("a.jsonl", GOOD + b'{"text": "x"},\n', r"line 2 is not JSON \(Extra data, character 14 of it\): give one"),
        ("a.jsonl", GOOD + b'{"text": ' + b"9" * 5000 + b"}\n", r"line 2 has a number as text: give"),
        ("a.jsonl", GOOD + b"[" * 200_000, r"line 2 is nested too deeply to be read: give one JSON object a line"),
        ("a.jsonl", GOOD + b"{}\n", r"line 2 has no field text but an empty object: give"),
        ("a.jsonl", GOOD + b'{"a\\nb": 1, "\\ud83d": 2}\n', r"line 2 has no field text but the fields a\?b, \?: give"),
        ("a.jsonl", json.dumps({f"k{n}": n for n in range(99)}).encode(), r"fields k0, .*, k7 and 91 more: give"),
        ("a.jsonl", "\ufeff{}".encode("utf-16-le"), r"line 1 is not UTF-8 but UTF-16 by its byte order mark: convert"),
        (
            "a.jsonl",
            gzip.compress(GOOD, mtime=0),
            r"line 1 is not UTF-8, and by its first bytes the file is gzip: give",
        ),
        ("a.txt", b"one\ntwo\n\xff\n", r"a\.txt, line 3 is not UTF-8: convert"),
        ("a.txt", "words".encode("utf-16"), r"a\.txt, line 1 is not UTF-8 but UTF-16 by its byte order mark: convert"),
        ("a.txt", "words".encode("utf-16-le"), r"a\.txt, line 1 begins a stretch with many NUL bytes, as UTF-16 and"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet is not a readable parquet file"),
    ],
)
def test_bad_content_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_line_number_counts_from_the_front_of_the_file_not_of_the_part(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 40 + b"oops\n")
    with pytest.raises(ValueError, match="line 41 is not JSON"):
        read(tmp_path / "a.jsonl", part_bytes=100)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"body": ["x"]}, r"has no column text but body: name its text in data\.text_field"),
        ({"text": ["x", None]}, r"a\.parquet, row 1 has null as text"),
        ({"text": [1, 2]}, r"a\.parquet, row 0 has a number as text"),
        ({"text": [b"x", b"\xff"]}, r"a\.parquet, row 1 is not UTF-8: write it again"),
        ({"text": [["x"]]}, r"a\.parquet, row 0 has a list as text"),
        ({"text": [{"a": "x"}]}, r"a\.parquet, row 0 has an object as text"),
        ({"text": [datetime(2020, 1, 1)]}, r"a\.parquet, row 0 has a time as text"),
        ({f"c{n}": ["x"] for n in range(99)}, r"has no column text but c0, .*, c7 and 91 more: name"),
    ],
)
def test_bad_parquet_is_named_by_column_or_row(tmp_path: Path, table: dict[str, list], sentence: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / "a.parquet")


def test_a_damaged_page_of_parquet_is_named(tmp_path: Path, parquet: Path) -> None:
    content = bytearray(parquet.read_bytes())
    content[4:40] = b"\xff" * 36
    parquet.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is (damaged|not a readable parquet file) \(.*\): write it again"):
        read(parquet)


def test_a_path_that_is_missing_empty_or_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tsv").touch()
    for path, sentence in {
        tmp_path / "nowhere": "does not exist: give",
        tmp_path / "empty": "holds no data: give",
        tmp_path / "a.tsv": "has a suffix that is not known: give",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            find_files(path)


def test_a_file_without_read_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD)
    parts = cut_file(file, 1 << 20)
    file.chmod(0)
    if os.access(file, os.R_OK):

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", str(file))

        # Root can read everything.
        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read \(Permission denied\): give"):
        list(read_documents(parts[0], "text"))


def test_the_split_follows_from_the_text_alone_and_grows_with_the_share() -> None:
    texts = [f"text {index}".encode() for index in range(20_000)]
    small, large = ({text for text in texts if is_heldout(text, share)} for share in (0.01, 0.1))
    assert 140 < len(small) < 260
    assert 1800 < len(large) < 2200
    assert small < large
    assert small == {text for text in reversed(texts) if is_heldout(text, 0.01)}


def names_below(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_files(folder)]


def test_linked_folders_and_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    for name in ("far/deep/b.txt", "far/a.jsonl", "alone.parquet"):
        (tmp_path / name).touch()
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "z.txt").touch()
    (root / "linked").symlink_to("../far")
    (root / "c.parquet").symlink_to(tmp_path / "alone.parquet")
    assert names_below(root) == ["c.parquet", "linked/a.jsonl", "linked/deep/b.txt", "z.txt"]


def test_links_in_a_loop_end_and_a_file_of_several_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text.txt").touch()
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c.txt").symlink_to("a/text.txt")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "0.md").symlink_to("text.txt")
    assert names_below(tmp_path) == ["a/text.txt"]


def test_a_link_out_and_back_does_not_read_the_folder_twice(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    (tmp_path / "beside.txt").touch()
    (tmp_path / "corpus" / "up").symlink_to(tmp_path)
    assert names_below(tmp_path / "corpus") == ["a.txt", "up/beside.txt"]


def test_hidden_files_and_folders_are_not_text(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "corpus"
    for name in (".git/a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b/.cache/c.jsonl", "b/.a.txt.swp", "b/._a.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "b" / "a.txt").touch()
    (root / ".#lock.txt").symlink_to("nowhere")
    assert names_below(root) == ["b/a.txt"]


@pytest.mark.parametrize("target", ["nowhere", "gone"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "gone").symlink_to(target)
    with pytest.raises(ValueError, match=rf"gone is a link to {target}, which cannot be reached: mend or remove it"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match=rf"data.path=\S*gone is a link to {target}, which does not exist: give"):
        find_files(tmp_path / "gone")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match=r"a\.jsonl is neither a file nor a folder"):
            find_files(path)


def test_a_suffix_in_capitals_is_the_same_kind(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_bytes(b"words")
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(jsonl(["more"])))
    assert [text for file in find_files(tmp_path) for text in read(file)] == ["words", "more"]


def test_files_of_other_kinds_are_said_to_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert left_out(str(tmp_path)) is None
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.tsv").touch()
    assert str(left_out(str(tmp_path))).endswith(
        ": left out 1 file that is not of .txt, .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.zstd, .json.gz, .json.zst, .csv, "
        ".parquet, such as b/c.tsv."
    )
    (tmp_path / "z.zst").touch()
    assert "left out 2 files that are not of" in str(left_out(str(tmp_path)))
    assert left_out(str(tmp_path / "a.txt")) is None


def test_the_key_of_a_corpus_sees_what_its_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("one")
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "linked").symlink_to("../far")
    before = content_key(find_files(root), tmp_path / "cache")
    (tmp_path / "far" / "a.txt").write_text("two")
    changed = content_key(find_files(root), tmp_path / "cache")
    (tmp_path / "far" / "b.txt").write_text("three")
    assert len({before, changed, content_key(find_files(root), tmp_path / "cache")}) == 3
