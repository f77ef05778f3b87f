"""data=tokens: Megatron's files, flat files and saved datasets are read in place, and their types and ids are checked."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import DataConfig
from tests.small_models import gpt2, saved
from train.data import PreparedData, TokenStream, heldout_tokens, load_tokenizer, prepare, training_blocks
from train.data.foreign import MEGATRON_MAGIC, find_spans
from train.data.spans import dataset_spans
from train.data.tokenizer import train_bpe

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
    with pytest.raises(ValueError, match=r"olmo\.npy has a 0 in every other position.*set data\.token_dtype=uint32"):
        prepared(path, tokenizer)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer):
    np.array([*IDS, 300], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin holds the id 300, but the tokenizer has 300 ids: give the tokenizer"):
        prepared(tmp_path / "a.bin", tokenizer)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("short", r"text\.idx does not match text\.bin"),
        ("magic", r"text\.idx does not begin like Megatron's index"),
        ("cut", r"text\.idx has 100 bytes, but its 40 sequences need"),
        ("floats", "gives the ids type 7, which is not an integer type for ids"),
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


def damage_index(folder: Path) -> Path:
    path = write_megatron(folder)
    index = folder / "text.idx"
    index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 99_999))
    return path


def write_saved(folder: Path, rows: Any, **options: Any) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"input_ids": rows}, **options).save_to_disk(folder / "saved")
    return folder / "saved"


def write_splits(folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_dict({"input_ids": DOCUMENTS})).save_to_disk(folder / "saved")
    return folder / "saved"


def write_selection(folder: Path) -> Path:
    saved = write_saved(folder, DOCUMENTS)
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    return saved


def write_array(folder: Path, array: Any, num_bytes: int | None = None) -> Path:
    np.save(folder / "a.npy", array, allow_pickle=True)
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:num_bytes])
    return folder / "a.npy"


def write_nano(folder: Path) -> Path:
    write_flat(folder, name="train.bin")
    write_flat(folder, name="val.bin")
    return folder


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (damage_index, r"text\.idx names sequences that it does not have \(40 in all\): copy it again"),
        (lambda folder: write_megatron(folder).with_suffix(""), r"does not exist: give data\.path=\S*text\.bin\."),
        (lambda folder: write_saved(folder, [1, 2, 3]), "has a column input_ids of type int.*: give lists of ids"),
        (lambda folder: write_saved(folder, [[1, 2], None]), "has nulls in the column input_ids: leave out those rows"),
        (write_splits, r"holds the splits train: give one of them, data\.path=\S*saved/train"),
        (write_selection, "is a selection of rows that an old version of datasets saved"),
        (lambda folder: write_array(folder, np.ones((3, 3), np.uint16)), r"is an array uint16\[3, 3\]: give a one-dim"),
        (lambda folder: write_array(folder, np.array([{}])), r"a\.npy is not a complete array of ids \(.*objects"),
        (lambda folder: write_array(folder, np.array(IDS), 999), r"a\.npy is not a complete array of ids \(mmap"),
        (lambda folder: write_array(folder, np.full(99, -1)), r"a\.npy holds the id -1, but the tokenizer has 300 ids"),
        (write_nano, r"would train on the held-out tokens of \S*val\.bin: give data\.path=\S*train\.bin, and score"),
    ],
)
def test_files_that_cannot_be_read_as_ids_are_refused_in_a_sentence(tmp_path, tokenizer, write, words):
    with pytest.raises(ValueError, match=words) as caught:
        prepared(write(tmp_path), tokenizer)
    assert "\n" not in str(caught.value)


def test_rows_of_one_length_are_read_in_place(tmp_path, tokenizer):
    from datasets import Features, List, Value

    rows = [list(range(1 + number, 17 + number)) for number in range(60)]
    data = prepared(write_saved(tmp_path, rows, features=Features({"input_ids": List(Value("int32"), 16)})), tokenizer)
    train = TokenStream(data.folder, "train")
    assert train[:].tolist() == [token for row in rows[:48] for token in row]
    assert train.document_starts(0, len(train)).tolist() == list(range(0, 48 * 16, 16))


def test_all_files_below_a_folder_are_read_and_empty_ones_hold_nothing(tmp_path, tokenizer):
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        write_flat(tmp_path / name)
    (tmp_path / "a" / "empty.bin").touch()
    data = prepared(tmp_path, tokenizer)
    assert data.train.num_tokens + data.heldout.num_tokens == 2 * len(IDS)


def test_bos_is_believed_only_if_every_document_begins_with_it(tmp_path, tokenizer):
    for number, rows in enumerate(([[0, *document] for document in DOCUMENTS], [[0, 5], *DOCUMENTS])):
        (tmp_path / str(number)).mkdir()
        write_saved(tmp_path / str(number), rows)
    assert prepared(tmp_path / "0" / "saved", tokenizer, bos=True).bos == 0
    assert prepared(tmp_path / "1" / "saved", tokenizer).bos is None
    with pytest.raises(ValueError, match=r"data\.bos=true, but not all documents of .* begin with the bos id 0: set"):
        prepared(tmp_path / "1" / "saved", tokenizer, bos=True)


def test_special_tokens_are_no_text_of_the_held_out_part(tmp_path):
    from transformers import PreTrainedTokenizerFast

    train_bpe(["some words to train on " * 20], 270, tmp_path / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>", bos_token="<begin>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    bos, word = tokenizer.bos_token_id, tokenizer.encode("word")
    write_saved(tmp_path, [[bos, *word, 0]] * 60)
    data = prepared(tmp_path / "saved", tmp_path / "tokenizer")
    assert data.heldout.num_documents == 12
    assert data.heldout.num_bytes == 12 * len("word")


def test_rows_of_several_batches_keep_their_order_and_their_documents(tmp_path, tokenizer):
    rows = [[1 + number % 250, *range(2, 2 + number % 5), 0] for number in range(2_300)]
    data = prepared(write_saved(tmp_path, rows), tokenizer, heldout_share=0.1)
    train = TokenStream(data.folder, "train")
    # datasets writes batches of 1,000 rows, and the end of each is held out.
    starts = train.document_starts(0, len(train))
    documents = [part.tolist() for part in np.split(train[:], starts[1:])]
    assert documents[:800] == rows[:800]
    assert all(document in rows for document in documents[::50])
    assert data.train.num_documents + data.heldout.num_documents == 2_300
    assert data.train.num_tokens + data.heldout.num_tokens == sum(map(len, rows))


def test_rows_whose_offsets_do_not_begin_at_0_begin_at_their_own_ids(tmp_path):
    """pyarrow writes offsets from 0, but the format also allows others, as writers of slices make them."""
    import pyarrow as pa

    file = tmp_path / "data-00000-of-00001.arrow"
    rows = pa.record_batch({"input_ids": pa.array([[9], [5, 6, 7]], pa.list_(pa.int32()))})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)
    offsets, shifted = np.array([0, 1, 4], np.int32).tobytes(), np.array([1, 2, 4], np.int32).tobytes()
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, shifted))
    (span,) = dataset_spans(file)
    assert span.starts is not None
    assert (span.read().tolist(), span.starts.tolist()) == ([5, 6, 7], [0, 1])
