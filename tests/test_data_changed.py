"""If prepared tokens have changed since a run began, this is noticed before the run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conf.compose import composed
from tests.test_run import tiny, write_text
from train.checkpoints.resume import check_data, data_fingerprint
from train.data.pipeline import prepare


@pytest.fixture
def tokens(tmp_path) -> Path:
    """Make a folder of prepared tokens."""
    write_text(tmp_path / "text.jsonl")
    config = composed("train", tiny(tmp_path, "data.max_documents=60"))
    return Path(prepare(config.data, "train", 300, 32).folder)


def test_a_touched_file_is_read_again_and_accepted(tokens):
    before = data_fingerprint(str(tokens))
    check_data(before, str(tokens))
    os.utime(tokens / "part-00000.train.bin", (1, 1))
    check_data(before, str(tokens))


@pytest.mark.parametrize("name", ["part-00000.train.bin", "part-00000.heldout.bin"])
@pytest.mark.parametrize("harm", ["flip a bit", "cut the tail"])
def test_a_changed_file_of_tokens_is_named(tokens, name, harm):
    before = data_fingerprint(str(tokens))
    data = bytearray((tokens / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tokens / name).write_bytes(data if harm == "flip a bit" else data[:-2])
    with pytest.raises(ValueError, match=rf"{name} has changed since the run began: delete .*overwrite=true"):
        check_data(before, str(tokens))


def test_another_index_is_said(tokens):
    before = data_fingerprint(str(tokens))
    index = tokens / "index.json"
    index.write_text(index.read_text().replace('"separator": 0', '"separator": 1'))
    with pytest.raises(ValueError, match="The training data has changed since the run began"):
        check_data(before, str(tokens))


def test_an_index_that_only_lacks_what_was_added_since_is_the_same(tokens):
    before = data_fingerprint(str(tokens))
    index = tokens / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "first_id": 1}, indent=1))
    assert data_fingerprint(str(tokens))["index"] != before["index"]
    check_data(before, str(tokens))
