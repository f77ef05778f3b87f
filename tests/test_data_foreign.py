"""data=tokens: Megatron's files, flat files and saved datasets are read in place, and their types and ids are checked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import DataConfig
from tests.small_models import gpt2, saved
from train.data import PreparedData, TokenStream, heldout_tokens, load_tokenizer, prepare, training_blocks
from train.data.foreign import MEGATRON_MAGIC, find_spans

LENGTH = 16
DOCUMENTS = [[0] * 0 + list(range(5 + number % 90, 45 + number % 90)) + [0] for number in range(40)]
"""Forty documents of forty ids and a separator."""
IDS = [token for document in DOCUMENTS for token in document]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return saved(gpt2(), tmp_path_factory.mktemp("model") / "m")


def prepared(path: Path, tokenizer: Path, **changes: Any) -> PreparedData:
    settings = {
        "source": "tokens", "path": str(path), "heldout_share": 0.2, "num_workers": 1,
        "cache_dir": str(path.parent / "cache"),
    }  # fmt: skip
    return prepare(DataConfig(**(settings | changes)), str(tokenizer), 300, LENGTH)


def write_megatron(folder: Path, dtype: str = "<u2", code: int = 8) -> Path:
    np.array(IDS, dtype).tofile(folder / "text.bin")
    lengths = np.array([len(document) for document in DOCUMENTS], "<i4")
    places = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    header = MEGATRON_MAGIC + struct.pack("<QBQQ", 1, code, len(DOCUMENTS), len(DOCUMENTS) + 1)
    index = (
        header
        + lengths.tobytes()
        + places.astype("<i8").tobytes()
        + np.arange(len(DOCUMENTS) + 1, dtype="<i8").tobytes()
    )
    (folder / "text.idx").write_bytes(index)
    return folder / "text.bin"


def write_dataset(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"input_ids": DOCUMENTS}).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def write_flat(folder: Path, dtype: str = "<u2", name: str = "text.bin") -> Path:
    np.array(IDS, dtype).tofile(folder / name)
    return folder / name


def write_npy(folder: Path) -> Path:
    np.save(folder / "text.npy", np.array(IDS, np.int32))
    return folder / "text.npy"


@pytest.mark.parametrize("write", [write_megatron, write_flat, write_npy, write_dataset])
def test_ids_and_documents_are_those_in_the_files(tmp_path, tokenizer, write):
    data = prepared(write(tmp_path), tokenizer, attention="document")
    train = TokenStream(data.folder, "train")
    assert len(train) + data.heldout.num_tokens == len(IDS)
    assert data.train.num_documents + data.heldout.num_documents == len(DOCUMENTS)
    everything = sorted([*train[:].tolist(), *heldout_tokens(data)[1:].tolist()])
    assert everything == sorted(IDS)
    assert train[:41].tolist() == DOCUMENTS[0]
    starts = train.document_starts(0, len(train)).tolist()
    assert starts == list(range(0, len(train), 41))
    assert training_blocks(data)[2]["position_ids"].tolist() == [*range(9), *range(7)]
    held = load_tokenizer(data.tokenizer).decode([token for token in heldout_tokens(data)[1:] if token])
    assert data.heldout.num_bytes == len(held.encode())


def test_nothing_is_copied(tmp_path, tokenizer):
    data = prepared(write_flat(tmp_path), tokenizer)
    assert TokenStream(data.folder, "train").paths == [str(tmp_path / "text.bin")]
    assert sum(file.stat().st_size for file in Path(data.folder).iterdir()) < 8000


def test_four_bytes_are_asked_for_and_read(tmp_path, tokenizer):
    path = write_flat(tmp_path, "<u4", "olmo.npy")
    data = prepared(path, tokenizer, token_dtype="uint32")
    assert TokenStream(data.folder, "train")[:41].tolist() == DOCUMENTS[0]
    with pytest.raises(ValueError, match=r"olmo\.npy has a 0 in every other place.*set data\.token_dtype=uint32"):
        prepared(path, tokenizer)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer):
    np.array([*IDS, 300], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin holds the id 300, and the tokenizer has 300: give the tokenizer"):
        prepared(tmp_path / "a.bin", tokenizer)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("short", r"text\.idx does not fit text\.bin"),
        ("magic", r"text\.idx does not begin as Megatron's index does"),
        ("cut", r"text\.idx has 100 bytes where its 40 sequences need"),
        ("floats", "says that ids are of type 7, which is none for ids"),
    ],
)
def test_damaged_megatron_files_are_refused_by_what_is_wrong(tmp_path, damage, words):
    path = write_megatron(tmp_path, code=7 if damage == "floats" else 8)
    index = tmp_path / "text.idx"
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "magic":
        index.write_bytes(b"x" + index.read_bytes()[1:])
    elif damage == "cut":
        index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match=words):
        find_spans(path, 300, None)


def test_a_folder_without_tokens_and_a_tokenizer_to_be_trained_are_refused(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tokens: give"):
        prepared(tmp_path / "empty", tokenizer)
    with pytest.raises(ValueError, match="data=tokens needs the tokenizer that wrote the tokens"):
        prepared(write_flat(tmp_path), Path("train"))


def test_a_file_that_changes_makes_another_folder(tmp_path, tokenizer):
    before = prepared(write_flat(tmp_path), tokenizer).folder
    np.array([*IDS[41:], *IDS], "<u2").tofile(tmp_path / "text.bin")
    assert prepared(tmp_path / "text.bin", tokenizer).folder != before
