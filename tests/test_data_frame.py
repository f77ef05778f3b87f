"""The parts of a document that are stored: bos, eos, the cut, its start, and the bytes that its tokens stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conf.schema import DataConfig
from tests.tiny_run import write_text
from train.data import PreparedData, TokenStream, load_tokenizer, prepare, training_blocks
from train.data.pack import Frame
from train.data.stream import heldout_starts


def prepared(folder: Path, *, tokenizer: str = "train", **changes: object) -> PreparedData:
    settings = {
        "source": "text", "path": str(folder / "text.jsonl"), "heldout_share": 0.1, "num_workers": 1,
        "cache_dir": str(folder / "cache"), "max_documents": 40,
    }  # fmt: skip
    return prepare(DataConfig(**(settings | changes)), tokenizer, 300, 32)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "text.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("frame", "ids", "kept"),
    [
        (Frame(None, 9), [1, 2, 3, 9], 3),
        (Frame(8, 9), [8, 1, 2, 3, 9], 3),
        (Frame(8, 9, 5), [8, 1, 2, 3, 9], 3),
        (Frame(8, 9, 4), [8, 1, 2, 3], 3),
        (Frame(8, 9, 3), [8, 1, 2], 2),
        (Frame(None, 9, 2), [1, 2], 2),
        (Frame(None, None), [1, 2, 3], 3),
    ],
)
def test_a_document_is_cut_after_bos_and_eos_were_put_around_it(frame, ids, kept):
    assert frame.around([1, 2, 3]) == ids
    assert frame.num_kept(3) == kept


def test_streams_hold_each_document_in_its_frame_and_where_it_begins(folder):
    whole = prepared(folder)
    framed = prepared(folder, bos=True, max_document_tokens=12)
    plain = TokenStream(whole.folder, "train")
    begins = [*plain.document_starts(0, len(plain)).tolist(), len(plain)]
    stream = TokenStream(framed.folder, "train")
    starts = stream.document_starts(0, len(stream)).tolist()
    assert len(starts) == framed.train.num_documents == whole.train.num_documents
    for number, start in enumerate(starts):
        document = plain[begins[number] : begins[number + 1]].tolist()
        assert stream[start : start + 12].tolist() == [0, *document][:12]
    assert stream.document_starts(starts[1], starts[3]).tolist() == starts[1:3]
    assert stream.document_starts(starts[1] + 1, starts[2]).tolist() == []


def test_bytes_are_those_that_the_kept_tokens_stand_for(folder):
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()[:40]]
    framed = prepared(folder, bos=True, max_document_tokens=12)
    tokenizer = load_tokenizer(framed.tokenizer)
    expected = sum(len(tokenizer.decode(tokenizer(text)["input_ids"][:11]).encode()) for text in texts)
    assert framed.train.num_bytes + framed.heldout.num_bytes == expected
    assert prepared(folder).train.num_bytes > framed.train.num_bytes


def test_blocks_by_document_restart_and_predict_no_first_token(folder):
    data = prepared(folder, attention="document", max_document_tokens=12)
    causal = prepared(folder, max_document_tokens=12)
    assert data.folder == causal.folder
    stream = TokenStream(data.folder, "train")
    block = training_blocks(data)[3]
    assert torch.equal(block["input_ids"], training_blocks(causal)[3]["input_ids"])
    starts = (stream.document_starts(96, 128) - 96).tolist()
    assert starts
    position = 0
    for place in range(32):
        position = 0 if place in starts or place == 0 else position + 1
        assert int(block["position_ids"][place]) == position
        expected = -100 if position == 0 else int(block["input_ids"][place])
        assert int(block["labels"][place]) == expected


def test_held_out_documents_begin_one_place_later_than_in_their_file(folder):
    data = prepared(folder, attention="document")
    starts = heldout_starts(data)
    assert starts is not None
    assert starts[0] == 1
    assert len(starts) == data.heldout.num_documents
    assert heldout_starts(prepared(folder)) is None


def test_a_tokenizer_without_bos_is_refused_by_name(folder, tmp_path):
    tokenizer = load_tokenizer(prepared(folder).tokenizer)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "no-bos")
    with pytest.raises(ValueError, match=r"data\.bos=true needs a bos token and tokenizer=.*no-bos has none"):
        prepared(folder, tokenizer=str(tmp_path / "no-bos"), bos=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "documents"}, r"data\.attention=documents is not known: choose one of causal, document"),
        ({"max_document_tokens": 1}, r"data\.max_document_tokens=1 must be at least 2"),
        (
            {"source": "wikitext", "bos": True, "max_documents": None},
            "data=wikitext is scored by conventions of its own",
        ),
    ],
)
def test_values_that_mean_nothing_are_refused(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        prepared(folder, **changes)
