"""data=mixture: each window of a thousand blocks has the shares of tokens, for any world size and length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import DataConfig
from conf.schema.data import SourceConfig
from train.data import PreparedData, prepare
from train.data.mixture import WINDOW, MixedOrder, mixture_blocks, window_counts
from train.data.sources import sources_of

LENGTH = 16


@pytest.mark.parametrize("weights", [[7, 3], [1, 1, 1], [0.0004, 0.9996], [0.1, 0.2, 0.3, 0.4], [1, np.pi, 17.5]])
def test_each_window_and_all_of_them_together_hold_the_shares_to_one_block(weights):
    exact = WINDOW * np.array(weights) / sum(weights)
    counts = window_counts(weights, np.arange(500))
    assert (counts.sum(axis=1) == WINDOW).all()
    assert abs(counts - exact).max() < 1
    assert abs(counts.sum(axis=0) - 500 * exact).max() < 3


def test_a_source_gives_its_blocks_one_after_another():
    order = MixedOrder([7, 3], 2500, seed=0)
    found = [order.source_at(place) for place in range(2500)]
    for source in (0, 1):
        numbers = [number for one, number in found if one == source]
        assert numbers == list(range(len(numbers)))
        assert order.counts_before(1234)[source] == sum(one == source for one, _ in found[:1234])
    assert sum(source == 0 for source, _ in found[1000:2000]) == 700


def test_a_longer_run_begins_with_a_shorter_one_and_another_seed_mixes_anew():
    def places(num_blocks: int, seed: int = 0) -> list[tuple[int, int]]:
        order = MixedOrder([2, 1], num_blocks, seed)
        return [order.source_at(place) for place in range(300)]

    assert places(300) == places(9000)
    assert places(300) != places(300, seed=1)


def write(file: Path, word: str, count: int) -> Path:
    file.write_text("".join(json.dumps({"text": f"{word} {number} " * 9}) + "\n" for number in range(count)))
    return file


def prepared(folder: Path, *sources: dict[str, Any], **changes: Any) -> PreparedData:
    settings = {
        "source": "mixture", "heldout_share": 0.2, "num_workers": 1, "cache_dir": str(folder / "cache"),
        "sources": [SourceConfig(**source) for source in sources],
    }  # fmt: skip
    return prepare(DataConfig(**(settings | changes)), "train", 300, LENGTH)


@pytest.fixture
def two(tmp_path: Path) -> PreparedData:
    files = [write(tmp_path / "long.jsonl", "red", 300), write(tmp_path / "short.jsonl", "blue", 30)]
    return prepared(tmp_path, {"path": str(files[0]), "weight": 7}, {"path": str(files[1]), "weight": 3, "name": "b"})


def test_the_blocks_of_a_mixture_are_its_sources_in_their_shares(two):
    from train.data import load_tokenizer

    tokenizer = load_tokenizer(two.tokenizer)
    blocks = mixture_blocks(two, 1000, seed=0)
    texts = [tokenizer.decode(blocks[place]["input_ids"]) for place in range(1000)]
    assert sum("red" in text for text in texts) == pytest.approx(700, abs=10)
    assert not any("red" in text and "blue" in text for text in texts)
    assert [source.name for source in two.sources] == ["long", "b"]
    figures = blocks.figures(1000)
    assert (figures["tokens/long"], figures["tokens/b"]) == (700 * LENGTH, 300 * LENGTH)
    assert figures["epochs/b"] == 300 / (two.sources[1].train.num_tokens // LENGTH)


def test_a_source_that_is_through_repeats_in_another_order(two):
    blocks = mixture_blocks(two, 1000, seed=0)
    size = len(blocks.blocks[1])
    epochs = [[blocks.block_of(1, epoch * size + place) for place in range(size)] for epoch in range(2)]
    assert size < 150
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * 2
    assert epochs[0] != epochs[1]


def test_sources_continue_after_the_blocks_that_a_branch_took_over(two):
    first = mixture_blocks(two, 40, seed=0)
    places = [first.order.source_at(place) for place in range(20)]
    taken = {name: sum(source == number for source, _ in places) for number, name in enumerate(first.names)}
    seen = [(source, first.block_of(source, number)) for source, number in places]

    second = mixture_blocks(replace(two, sources=two.sources[::-1]), 40, seed=0)
    second.continue_from(20, {**taken, "gone": 5})
    rest = [second.order.source_at(place) for place in range(20, 40)]
    for place, (source, _) in enumerate(rest, start=20):
        number = taken[second.names[source]] + sum(one == source for one, _ in rest[: place - 20])
        expected = second.blocks[source][second.block_of(source, number)]["input_ids"]
        assert second[place]["input_ids"].tolist() == expected.tolist()
        # No block of the long source comes again, although the sources are in another order now.
        assert (1 - source, second.block_of(source, number)) not in seen or source == 0
    figures = second.figures(40)
    assert figures["tokens/gone"] == 5 * LENGTH
    assert sum(figures[f"tokens/{name}"] for name in second.names) == 40 * LENGTH


def test_a_branch_of_an_earlier_version_keeps_its_order(two):
    order, branch = mixture_blocks(two, 40, seed=0), mixture_blocks(two, 40, seed=0)
    branch.continue_from(20, {})
    assert all(branch[place]["input_ids"].tolist() == order[place]["input_ids"].tolist() for place in range(20, 40))


def test_held_out_text_is_that_of_all_sources_and_is_read_as_one(two):
    from train.data import TokenStream, heldout_tokens, training_blocks

    assert two.heldout.num_tokens == sum(source.heldout.num_tokens for source in two.sources)
    assert len(heldout_tokens(two)) == 1 + two.heldout.num_tokens
    first = TokenStream(two.sources[0].folder, "train")
    assert len(training_blocks(two)) == two.train.num_tokens // LENGTH
    assert (TokenStream(two.folder, "train")[: len(first)] == first[:]).all()


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], r"data=mixture needs data\.sources="),
        ([{"path": "a"}, {"path": "b/a.txt"}], "two sources called a: give one of them another name"),
        ([{"path": "a", "hub": "b"}], "path=a and hub=b, but needs exactly one"),
        ([{"path": "a", "weight": 0}], "weight=0 of the source a must be above 0"),
        ([{"path": "a", "weight": float("inf")}], "weight=inf of the source a must be above 0 and finite"),
        ([{"path": "a", "weight": float("nan")}], "weight=nan of the source a must be above 0 and finite"),
        ([{"path": ".."}], r"The source \.\. has no name for the records: give it one with name=NAME"),
        ([{"path": "a", "name": "x/y"}], "name=x/y is part of the names of records"),
    ],
)
def test_sources_that_cannot_be_are_refused_in_a_sentence(tmp_path, sources, words):
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path, *sources)


def test_sources_are_typed_on_the_command_line_and_a_wrong_key_is_named():
    from conf.compose import composed

    config = composed("train", ["data=mixture", "data.sources=[{path:/a/b.jsonl,weight:7},{hub:allenai/c4,subset:en}]"])
    assert [(one.stem, one.weight, one.subset) for one in config.data.sources] == [("b", 7.0, None), ("c4", 1.0, "en")]
    with pytest.raises(ValueError, match="wieght"):
        composed("train", ["data=mixture", "data.sources=[{path:/a/b.jsonl,wieght:7}]"])


def test_the_sources_of_a_run_are_told_to_eval_as_they_are_typed():
    from conf.compose import composed
    from train.record.summary import sources_text

    sources = [
        SourceConfig(path="/a b/it's.jsonl", weight=7),
        SourceConfig(hub="allenai/c4", subset="en", field="meta.text"),
    ]
    config = composed("eval", ["folder=x", "data=mixture", f"data.sources={sources_text(sources)}"])
    assert config.data.sources == sources


def test_a_source_may_be_too_small_to_hold_text_out_if_the_others_do(tmp_path):
    files = [write(tmp_path / "long.jsonl", "red", 300), write(tmp_path / "few.jsonl", "blue", 3)]
    data = prepared(tmp_path, {"path": str(files[0])}, {"path": str(files[1])}, heldout_share=0.05)
    assert data.sources[1].heldout.num_tokens == 0
    assert data.heldout.num_tokens >= LENGTH
    write(files[1], "", 0)
    with pytest.raises(ValueError, match="the source few gives 0 training tokens"):
        prepared(tmp_path, {"path": str(files[0])}, {"path": str(files[1])}, heldout_share=0.05)


def test_one_text_under_two_names_is_refused(tmp_path):
    path = str(write(tmp_path / "a.jsonl", "red", 60))
    copy = str(write(tmp_path / "b.jsonl", "red", 60))
    with pytest.raises(ValueError, match="a and b have the same content: give it once, with the sum of their weights"):
        prepared(tmp_path, {"path": path}, {"path": copy})


def test_a_folder_of_tokens_and_text_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", "red", 60)
    (tmp_path / "b.bin").write_bytes(b"\1\0" * 99)
    with pytest.raises(ValueError, match=r"holds tokens \(b\.bin\) and text \(a\.jsonl\): give them as two sources"):
        prepared(tmp_path, {"path": str(tmp_path), "name": "both"})


def test_a_missing_source_is_noticed_before_any_is_read(tmp_path):
    first = str(write(tmp_path / "a.jsonl", "red", 60))
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist"):
        prepared(tmp_path, {"path": first}, {"path": str(tmp_path / "gone.jsonl")})
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_the_hub_sources_of_a_mixture_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.jsonl", "blue", 60)
    path = str(write(tmp_path / "a.jsonl", "red", 60))
    data = prepared(tmp_path, {"path": path}, {"hub": str(tmp_path / "hub")}, stream=True)
    assert [source.train.num_documents + source.heldout.num_documents for source in data.sources] == [60, 60]
    assert len(list((tmp_path / "cache" / "documents").glob("*/*.jsonl"))) == 1


def test_tokens_that_are_not_cut_are_named(tmp_path, capsys):
    from tests.small_models import gpt2, saved

    tokenizer = saved(gpt2(), tmp_path / "m")
    np.array([*range(1, 40), 0] * 30, "<u2").tofile(tmp_path / "t.bin")
    sources = [
        SourceConfig(path=str(tmp_path / "t.bin")),
        SourceConfig(path=str(write(tmp_path / "a.jsonl", "red", 60))),
    ]
    settings = DataConfig(
        source="mixture", sources=sources, max_document_tokens=8, num_workers=1, heldout_share=0.2,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    prepare(settings, str(tokenizer), 300, LENGTH)
    assert (
        "data.max_document_tokens=8 does not cut the documents of t: tokens are read as they are"
        in capsys.readouterr().err
    )


def test_a_source_without_a_field_of_its_own_reads_the_one_of_the_run(tmp_path):
    lines = [json.dumps({"text": "wrong", "body": f"body {number}", "title": f"title {number}"}) for number in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "a.jsonl")
    data = DataConfig(
        source="mixture", text_field="body", cache_dir=str(tmp_path),
        sources=[SourceConfig(path=path), SourceConfig(path=path, field="title", name="t")],
    )  # fmt: skip
    assert [source.config.text_field for source in sources_of(data)] == ["body", "title"]
