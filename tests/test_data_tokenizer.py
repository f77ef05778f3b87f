"""A tokenizer is trained, or read from a folder or a SentencePiece model; anything else is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.data import hub
from train.data.own_tokenizer import check_trainable
from train.data.pack import encoder
from train.data.tokenizer import check_vocabulary, load_tokenizer, separator_of, train_bpe, without_long_runs, wrap_bpe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = ["the cat sat on the mat", "the dog sat on the log", "größe 你好 🙂"] * 20

needs_llama = pytest.mark.skipif(
    not (SHARED / "llama2.tokenizer.model").exists(), reason="shared/data/llama2.tokenizer.model is not here"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_bpe(TEXTS, 290, tmp_path / "tokenizer.json")
    wrap_bpe(tmp_path / "tokenizer.json", max_length=128).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_trained_tokenizer_is_a_transformers_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 290
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == separator_of(tokenizer, "x") == 0
    assert tokenizer.pad_token is None
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize("text", ["the cat", "  two  spaces \n\n", "\r\n\t\0", "🙂 never seen: ☃", "a , b . c n't"])
def test_any_text_survives_a_trained_tokenizer(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_does_not_depend_on_the_order_of_the_texts(tmp_path: Path) -> None:
    train_bpe(TEXTS, 280, tmp_path / "a.json")
    train_bpe(TEXTS[::-1], 280, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_workers_encode_as_transformers_does_and_read_no_special_token_from_text(folder: Path) -> None:
    text = "the cat <|endoftext|> sat"
    [ids] = encoder(str(folder))([text])
    assert ids == load_tokenizer(str(folder)).encode(text, add_special_tokens=False, split_special_tokens=True)
    assert 0 not in ids


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 is too small .*: give at least 257"):
        check_trainable([], 256)


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has 290 tokens, more than model\.vocab_size=289: .* set model\.vocab_size=290"
    ):
        check_vocabulary(load_tokenizer(str(folder)), 289, "x")


def test_bos_ends_documents_where_there_is_no_eos_and_neither_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = None
    assert separator_of(tokenizer, "x") == 0
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="tokenizer=x has no eos or bos token"):
        separator_of(tokenizer, "x")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("./nowhere", "does not exist: give"),
        ("{tmp}/nowhere.model", "does not exist: give"),
        ("{tmp}/a.txt", "is not a tokenizer: give"),
        ("{tmp}/a.model", "is not a SentencePiece model: give"),
        ("{tmp}/empty", "cannot be loaded .*: give a folder"),
        ("someone/something", r"cannot be fetched from the hub .*: connect to the network, give a folder"),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, sentence: str
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.model").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=sentence) as caught:
        load_tokenizer(spec.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_that_asks_to_run_its_own_code_runs_none(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('foreign code ran')")
    try:
        load_tokenizer(str(folder))
    except ValueError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017


@needs_llama
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_sentencepiece_model_keeps_its_prefix_and_every_space(tmp_path: Path, as_folder: bool) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SHARED / "llama2.tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = load_tokenizer(str(tmp_path if as_folder else model))
    reference = SentencePieceProcessor(model_file=str(model))
    texts = ["Hello", " Hello", "A  probe", "def f():\n    return  x", "你好 🙂", *(" " * n + "x" for n in range(40))]
    assert [tokenizer.encode(text) for text in texts] == reference.encode(texts)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).encode(" A  probe") == reference.encode(" A  probe")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 32000)


@needs_llama
def test_wikitext_has_341469_llama2_tokens() -> None:
    tokenizer = load_tokenizer(str(SHARED / "llama2.tokenizer.model"))
    lines = (SHARED / "wikitext.test.raw").read_bytes().decode().split("\n")[:-1]
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    assert len(lines) == 4358
    assert 1 + len(tokenizer.encode(text, add_special_tokens=False)) == 341_469


def test_long_runs_are_cut_so_that_training_ends(tmp_path: Path) -> None:
    text = "a word " + "x" * 2500 + " then " + " " * 1500 + "end"
    pieces = without_long_runs(text)
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces] == [1007, 1000, 1505, 504]
    assert without_long_runs("some words, " * 999) == ["some words, " * 999]
    # Uncut, this word alone would take longer than any test may.
    train_bpe(["x" * 3_000_000, "words " * 99], 300, tmp_path / "tokenizer.json")
