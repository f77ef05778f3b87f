"""Prepared tokens depend only on the content, not on workers, interruptions, or other processes that prepare them."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conf.schema import DataConfig
from train.data import (
    Blocks,
    PreparedData,
    TokenStream,
    heldout_tokens,
    hub,
    load_tokenizer,
    prepare,
    training_blocks,
    unigram_bits_per_byte,
)
from train.data import pack as packing
from train.data.split import is_heldout

WORDS = ["sparse", "dense", "mask", "weight", "the", "of", "prune", "größe", "<|endoftext|>", "\n\n", "你好"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{index} " + " ".join(draw.choices(WORDS, k=60)) for index in range(count)]


TEXTS = make_texts(240)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write four files, which make four parts."""
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(4):
        lines = [json.dumps({"text": text}) for text in TEXTS[60 * index : 60 * index + 60]]
        (folder / f"{index}.jsonl").write_text("\n".join(lines))
    return folder


def run(
    path: Path | None, cache: Path, *, tokenizer: str = "train", vocab_size: int = 300, length: int = 64, **data: Any
) -> PreparedData:
    settings = {
        "source": "text",
        "path": path and str(path),
        "heldout_share": 0.1,
        "num_workers": 1,
        "cache_dir": str(cache),
    }
    return prepare(DataConfig(**(settings | data)), tokenizer, vocab_size, length)


def streams(prepared: PreparedData) -> tuple[list[int], list[int]]:
    return tuple(TokenStream(prepared.folder, split)[:].tolist() for split in ("train", "heldout"))


def test_decoded_tokens_are_the_documents_each_on_its_side_of_the_split(source: Path, tmp_path: Path) -> None:
    prepared = run(source, tmp_path / "cache")
    tokenizer = load_tokenizer(prepared.tokenizer)
    sides = [[text for text in TEXTS if is_heldout(text.encode(), 0.1) is side] for side in (False, True)]
    for ids, texts, counts in zip(streams(prepared), sides, (prepared.train, prepared.heldout), strict=True):
        documents: list[list[int]] = [[]]
        for token in ids:
            documents[-1].append(token)
            if token == prepared.separator:
                documents.append([])
        assert [tokenizer.decode(document[:-1]) for document in documents[:-1]] == texts
        assert documents[-1] == []
        assert counts.num_documents == len(texts)
        assert counts.num_tokens == len(ids)
        assert counts.num_bytes == sum(len(text.encode()) for text in texts)


def test_two_workers_write_what_one_does(source: Path, tmp_path: Path) -> None:
    one, two = (run(source, tmp_path / f"cache{workers}", num_workers=workers) for workers in (1, 2))
    assert streams(one) == streams(two)
    assert Path(one.folder, "index.json").read_text() == Path(two.folder, "index.json").read_text()


def test_gzip_and_parquet_give_the_same_streams_as_jsonl(source: Path, tmp_path: Path) -> None:
    import gzip

    for kind in ("gz", "parquet"):
        (tmp_path / kind).mkdir()
    for file in sorted(source.iterdir()):
        (tmp_path / "gz" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        texts = [json.loads(line)["text"] for line in file.read_text().split("\n")]
        pq.write_table(pa.table({"text": texts}), tmp_path / "parquet" / f"{file.stem}.parquet")
    expected = streams(run(source, tmp_path / "cache"))
    assert streams(run(tmp_path / "gz", tmp_path / "cache")) == expected
    assert streams(run(tmp_path / "parquet", tmp_path / "cache")) == expected


def count_packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []

    def pack(job: packing.Job) -> None:
        done.append(job.index)
        packing.pack(job)

    monkeypatch.setattr("train.data.folders.pack", pack)
    return done


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_only_the_part_that_is_not_whole_is_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before = run(source, tmp_path / "cache")
    expected = streams(before)
    part = Path(before.folder, "part-00002.train.bin")
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-2])
    done = count_packs(monkeypatch)
    assert run(source, tmp_path / "cache") == before
    assert done == [2]
    assert streams(before) == expected


def test_an_interrupted_run_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = streams(run(source, tmp_path / "whole"))

    def stop_at_two(job: packing.Job) -> None:
        if job.index == 2:
            raise KeyboardInterrupt
        packing.pack(job)

    with monkeypatch.context() as patch:
        patch.setattr("train.data.folders.pack", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "cache")
    done = count_packs(monkeypatch)
    assert streams(run(source, tmp_path / "cache")) == expected
    assert done == [2, 3]


def test_the_same_content_elsewhere_is_found_and_one_other_byte_is_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(source, tmp_path / "cache")
    done = count_packs(monkeypatch)
    moved = source.rename(tmp_path / "moved")
    assert run(moved, tmp_path / "cache") == first
    assert run(moved, tmp_path / "cache", length=32).folder == first.folder
    assert done == []
    data = (moved / "1.jsonl").read_bytes()
    (moved / "1.jsonl").write_bytes(data.replace(b"60 ", b"6x ", 1))
    assert run(moved, tmp_path / "cache").folder != first.folder
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [{"heldout_share": 0.2}, {"max_documents": 200}, {"vocab_size": 290}])
def test_an_option_that_matters_gives_another_folder(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    first = run(source, tmp_path / "cache")
    assert run(source, tmp_path / "cache", **change).folder != first.folder


def test_max_documents_takes_the_first_over_all_parts(source: Path, tmp_path: Path) -> None:
    prepared = run(source, tmp_path / "cache", max_documents=100)
    assert prepared.train.num_documents + prepared.heldout.num_documents == 100


def _prepare_in_a_process(path: Path, cache: Path) -> None:
    run(path, cache)


def test_two_processes_at_once_do_the_work_once_and_agree(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_prepare_in_a_process, args=(source, tmp_path / "cache")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert streams(run(source, tmp_path / "cache")) == streams(run(source, tmp_path / "alone"))
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_in_a_worker_is_the_same_sentence(source: Path, tmp_path: Path, num_workers: int) -> None:
    saved = run(source, tmp_path / "cache").tokenizer
    (source / "3.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    with pytest.raises(ValueError, match=r"3\.jsonl, line 2 has a number as text: give a string") as caught:
        run(source, tmp_path / "cache", tokenizer=saved, num_workers=num_workers)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_too_little_text_is_refused_with_the_numbers(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gives \d+ training tokens .* less than one block of 100000: give more text"):
        run(source, tmp_path / "cache", length=100_000)
    with pytest.raises(ValueError, match=r"data\.heldout_share=1e-09 holds out 0 tokens \(0 of 240 documents\)"):
        run(source, tmp_path / "cache", heldout_share=1e-9)


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_ids_take_two_bytes_up_to_65536_and_four_beyond(source: Path, tmp_path: Path, size: int, dtype: str) -> None:
    small = run(source, tmp_path / "cache")
    expected = streams(small)
    shutil.copytree(small.tokenizer, tmp_path / "large")
    file = tmp_path / "large" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"extra {index}": index for index in range(300, size)}
    file.write_text(json.dumps(content))
    prepared = run(source, tmp_path / "cache", tokenizer=str(tmp_path / "large"), vocab_size=size)
    assert prepared.vocab_size == size
    assert TokenStream(prepared.folder, "train").dtype == np.dtype(dtype)
    assert streams(prepared) == expected


def test_a_tokenizer_larger_than_the_model_is_refused(source: Path, tmp_path: Path) -> None:
    saved = run(source, tmp_path / "cache").tokenizer
    with pytest.raises(ValueError, match=r"has 300 tokens, more than model\.vocab_size=299"):
        run(source, tmp_path / "cache", tokenizer=saved, vocab_size=299)


def test_a_tokenizer_that_does_not_fit_is_refused_before_the_text_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = run(source, tmp_path / "cache").tokenizer

    def read(*_: Any) -> None:
        raise AssertionError("the text was read")

    monkeypatch.setattr("train.data.pipeline.find_corpus", read)
    with pytest.raises(ValueError, match=r"has 300 tokens, more than model\.vocab_size=299"):
        run(source, tmp_path / "cache", tokenizer=saved, vocab_size=299)
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 is too small to train a tokenizer"):
        run(source, tmp_path / "cache", vocab_size=256)


def test_unigram_bits_per_byte_equals_an_independent_count(source: Path, tmp_path: Path) -> None:
    prepared = run(source, tmp_path / "cache")
    train, heldout = streams(prepared)
    counts = Counter(train)
    bits = sum(-math.log2((counts[token] + 1) / (len(train) + 300)) for token in heldout)
    num_bytes = sum(len(text.encode()) for text in TEXTS if is_heldout(text.encode(), 0.1))
    assert unigram_bits_per_byte(prepared) == pytest.approx(bits / num_bytes, rel=1e-12)


def test_heldout_tokens_start_with_the_separator(source: Path, tmp_path: Path) -> None:
    prepared = run(source, tmp_path / "cache")
    tokens = heldout_tokens(prepared)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [prepared.separator, *streams(prepared)[1]]


def test_a_stream_slices_across_parts_like_one_array(source: Path, tmp_path: Path) -> None:
    stream = TokenStream(run(source, tmp_path / "cache").folder, "train")
    whole = stream[:]
    assert len(stream.paths) == 4
    assert len(whole) == len(stream)
    for edge in stream.starts[:-1]:
        for start, stop in ((edge, edge + 1), (max(edge - 3, 0), edge + 3), (edge, edge), (edge - 5, edge)):
            assert stream[start:stop].tolist() == whole[start:stop].tolist()
    assert stream[-7:].tolist() == whole[-7:].tolist()


def test_blocks_are_int64_tensors_that_tile_the_stream_and_survive_pickling(source: Path, tmp_path: Path) -> None:
    prepared = run(source, tmp_path / "cache")
    blocks = training_blocks(prepared)
    restored: Blocks = pickle.loads(pickle.dumps(blocks))
    assert len(blocks) == prepared.num_blocks == prepared.train.num_tokens // 64
    item = restored[1]
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    tiled = torch.cat([block["input_ids"] for block in (blocks[index] for index in range(len(blocks)))])
    assert tiled.tolist() == streams(prepared)[0][: 64 * len(blocks)]
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_prepared_data_can_be_sent_and_names_shared_storage_where_it_is_not(source: Path, tmp_path: Path) -> None:
    prepared = run(source, tmp_path / "cache")
    assert pickle.loads(pickle.dumps(prepared)) == prepared
    shutil.rmtree(prepared.folder)
    with pytest.raises(ValueError, match=r"put data\.cache_dir on storage that all machines"):
        training_blocks(prepared)


def fineweb_shards(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    for index in range(2):
        half = texts[index::2]
        columns = {
            "text": half,
            "id": half,
            "dump": half,
            "url": half,
            "file_path": half,
            "language": ["en"] * len(half),
            "language_score": [0.9] * len(half),
            "token_count": [9] * len(half),
            "score": [3.1] * len(half),
            "int_score": [3] * len(half),
        }
        pq.write_table(pa.table(columns), folder / f"{index:03}_00000.parquet")


def test_a_local_fineweb_copy_is_read_by_subset_or_as_a_plain_folder(tmp_path: Path) -> None:
    fineweb_shards(tmp_path / "copy/sample/10BT", TEXTS)
    fineweb_shards(tmp_path / "copy/data/CC-MAIN-2024-10", TEXTS[:120])
    settings = {"cache": tmp_path / "cache", "source": "fineweb_edu"}
    sample = run(tmp_path / "copy", subset="sample-10BT", **settings)
    plain = run(tmp_path / "copy/sample/10BT", **settings)
    dump = run(tmp_path / "copy", subset="CC-MAIN-2024-10", **settings)
    assert sample.folder == plain.folder
    assert sample.train.num_documents + sample.heldout.num_documents == 240
    assert dump.train.num_documents + dump.heldout.num_documents == 120


def test_fineweb_without_the_hub_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(ValueError, match=r"cannot be read from the hub .*: connect to the network, or give a folder"):
        run(None, tmp_path / "cache", source="fineweb_edu", subset="sample-10BT")


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, train.data.pack, train.data.pipeline; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
