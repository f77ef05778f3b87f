"""WikiText's rows, pages and prose, and the parts of them that a model reads."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema import DataConfig
from eval.model.wikitext import WikiText, as_prose, read_wikitext
from tests.commands import SHARED

SOURCE = (
    " \n = A town = \n \n It has 200 men . \n = = History = = \n \n Old ; very . \n \n = Another = \n \n The end . \n"
)


def data(path, **changes) -> DataConfig:
    return DataConfig(source="wikitext", path=str(path), cache_dir="unused", **changes)


def test_rows_are_joined_as_the_hub_gives_them():
    text = WikiText(" \n = A = \n \n one two \n").text
    assert text == "\n\n".join(["", " = A = \n", "", " one two \n"])


def test_pages_begin_at_titles_of_the_first_level():
    assert [page.split("\n")[0] for page in WikiText(SOURCE).pages] == [" = A town = ", " = Another = "]
    assert "\n".join(WikiText(SOURCE).pages) == SOURCE.removeprefix(" \n")


@pytest.mark.parametrize(
    ("line", "is_title"),
    [
        (" = A = ", True), ("= A =", True), (" = A = b = ", True), (" = = A = = ", False), (" = = = A = = = ", False),
        (" = A ", False), (" A = ", False), (" =A= ", False), (" = A = = ", False), (" = = A = ", False),
        (" ", False),
    ],
)  # fmt: skip
def test_only_a_line_between_single_signs_is_a_title(line, is_title):
    assert len(WikiText(f"before\n{line}\nbehind\n").pages) == 1 + is_title


def test_a_text_without_titles_is_one_page():
    assert WikiText("Plain words.\n\nMore of them.\n").pages == ["Plain words.\n\nMore of them.\n"]


@pytest.mark.parametrize(
    ("page", "prose"),
    [
        (" the cats ' tails ", " the cats' tails "),
        ("1 @,@ 234 @.@ 5 kg , a well @-@ known weight ", "1,234.5 kg, a well-known weight "),
        ("One : two ; three . Four ! Five ? Six ", "One: two; three. Four! Five? Six "),
        ("a ( b ) [ c ] { d } e", "a (b) [c] {d} e"),
        ('he said " so " and \' no \'', 'he said "so" and \'no\''),
        (" = = Part = = \n = = = Piece = = = \n = = = = Bit = = = = \n", " == Part ==\n=== Piece ===\n==== Bit ====\n"),
        ("20 ° C N of it 's", "20°C 1 of it's"),
        ("a \n b", "a\nb"),
    ],
)  # fmt: skip
def test_prose_follows_the_harness_rules(page, prose):
    assert as_prose(page) == prose


def test_words_are_counted_twice_as_the_two_conventions_do():
    text = WikiText(" = A = \n one two \n")
    assert text.num_words == 5
    # The harness also counts the empty pieces before and after a page.
    assert text.num_page_words == 7


def test_a_parquet_copy_of_the_hub_gives_the_file_back(tmp_path):
    rows = [line if line.strip() else "" for line in WikiText(SOURCE).lines]
    pq.write_table(pa.table({"text": rows}), tmp_path / "test.parquet")
    assert read_wikitext(data(tmp_path / "test.parquet")).source == SOURCE


def test_the_text_is_known_by_its_bytes(tmp_path):
    (tmp_path / "a.raw").write_bytes(SOURCE.encode() + "é\r\n".encode())
    text = read_wikitext(data(tmp_path / "a.raw"))
    assert text.sha256 == hashlib.sha256((tmp_path / "a.raw").read_bytes()).hexdigest()
    assert text.source.endswith("é\r\n")


def test_the_first_pages_alone_can_be_asked_for(tmp_path):
    (tmp_path / "a.raw").write_text(SOURCE + " = Third = \n")
    assert [page.split()[1] for page in read_wikitext(data(tmp_path / "a.raw", max_documents=2)).pages] == [
        "A",
        "Another",
    ]


BAD_FILES = {
    "absent": (None, "is not a file"),
    "empty": (b"", "holds no text"),
    "blank": (b" \n \n", "holds no text"),
    "latin-1": (b"a\nb\ncaf\xe9\n", "line 3 is not UTF-8"),
    "utf-16": ("words".encode("utf-16"), "line 1 is not UTF-8 but UTF-16 by its byte order mark"),
    "utf-16 without a mark": ("words".encode("utf-16-le"), "line 1 begins a stretch with many NUL bytes"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_an_unusable_file_is_named(kind, tmp_path):
    content, message = BAD_FILES[kind]
    if content is not None:
        (tmp_path / "a.raw").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_wikitext(data(tmp_path / "a.raw"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"page": ["a"]}, r"has no column text but page: name its text in data\.text_field"),
        ({"text": [1.5]}, r"row 0 has a number as text: give a string"),
        ({"text": [b"a", b"\xff"]}, r"row 1 is not UTF-8: write it again"),
    ],
)
def test_a_parquet_of_something_else_is_named(table, message, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_wikitext(data(tmp_path / "a.parquet"))


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file \(.*\): fetch it anew"):
        read_wikitext(data(tmp_path / "a.parquet"))


def test_rows_of_bytes_and_of_another_column_are_read(tmp_path):
    pq.write_table(pa.table({"page": [b" = A = \n", None, "é\n".encode()]}), tmp_path / "a.parquet")
    assert read_wikitext(data(tmp_path / "a.parquet", text_field="page")).source == " = A = \n \né\n"


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.raw").write_bytes(("\ufeff" + SOURCE).encode())
    assert read_wikitext(data(tmp_path / "a.raw")).source == SOURCE
    (tmp_path / "b.raw").write_bytes("\ufeff".encode())
    with pytest.raises(ValueError, match="holds no text"):
        read_wikitext(data(tmp_path / "b.raw"))


def test_one_page_alone_can_be_asked_for_and_none_cannot(tmp_path):
    (tmp_path / "a.raw").write_text(SOURCE)
    assert len(read_wikitext(data(tmp_path / "a.raw", max_documents=1)).pages) == 1
    with pytest.raises(ValueError, match="max_documents=0 must be at least 1: it is the number of pages to score"):
        data(tmp_path / "a.raw", max_documents=0)


def test_without_a_path_and_a_network_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("train.data.hub.is_reachable", lambda: False)
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub .* give its test file in data\.path"):
        read_wikitext(DataConfig(source="wikitext", cache_dir="unused"))


def test_the_hubs_rows_make_the_original_file(monkeypatch):
    import datasets

    rows = [line if line.strip() else "" for line in WikiText(SOURCE).lines]
    monkeypatch.setattr("train.data.hub.is_reachable", lambda: True)
    asked = []

    def load(*names: str, split: str) -> dict[str, list[str]]:
        asked.append((*names, split))
        return {"text": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_wikitext(DataConfig(source="wikitext", cache_dir="unused")).source == SOURCE
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


@pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="../shared/data with WikiText and LLaMA 2's tokenizer is not there"
)
def test_the_published_counts_of_wikitext_are_met():
    from eval.model.perplexity import tokenized
    from train.data import load_tokenizer

    text = read_wikitext(data(SHARED / "data" / "wikitext.test.raw"))
    tokens = tokenized(text, load_tokenizer(str(SHARED / "data" / "llama2.tokenizer.model")), "llama2")
    facts = json.loads(json.dumps(tokens.facts))
    assert len(tokens.tokens) == 341_469
    assert len(tokens.tokens) // 2048 == 166
    assert (tokens.tokens[0], list(tokens.tokens).count(1)) == (1, 1)
    assert (facts["num_words"], facts["num_lines"], facts["num_pages"]) == (241_211, 4_358, 62)
    assert facts["text_bytes"] == 1_290_590
    assert facts["text_sha256"] == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
