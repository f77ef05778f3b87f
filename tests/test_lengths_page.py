"""The commands of the pages yours.md, models.md and lengths.md, run as printed, but on a model and text that take seconds."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.architectures import folder_of
from tests.commands import ROOT, run_command
from tests.small_models import gpt2, saved
from tests.test_data_foreign import write_megatron
from tests.tiny_run import tiny, write_text
from train.data import load_tokenizer, prepare
from train.data.mixture import mixture_blocks
from train.record.read import read_config

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]
SHORTER = {
    "1600": "64", "500": "16", "600": "24", "320": "32", "160": "16", "80": "8", "60": "6", "20": "3", "10": "2", "10000": "4",
}  # fmt: skip
"""The numbers of steps on the pages, and those that the tests use instead."""


def commands(page: str) -> list[list[str]]:
    """Return the words of each command in the code blocks of a page."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m ")]


def shorter(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or not key.startswith(("trainer.", "optim.warmup", "sparsity.window", "branch_from")):
        return word
    return f"{key}={re.sub(r'(?<![0-9.a-z])[0-9]+(?![0-9.])', lambda found: SHORTER.get(found[0], found[0]), value)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_text(folder / "text.jsonl")
    return folder


def run(folder: Path, words: list[str]) -> None:
    usual = [
        item
        for item in tiny(
            folder, "logger=none", "launch.num_processes=1", "trainer.max_steps=32", "trainer.save_steps=16"
        )
        if not item.startswith(("run_name", "runs_dir"))
    ]
    # The length of a decay depends on where it branches.
    own = {item.partition("=")[0] for item in words} | ({"trainer.max_steps"} if "sweep=wsd_curve" in words else set())
    usual = [item for item in usual if item.partition("=")[0] not in own]
    if "model=hf" in words:
        usual = [item for item in usual if not item.startswith("model.")]
    if not {"data=text", "experiment=demo"} & set(words):
        usual = [item for item in usual if not item.startswith(("data=", "data.path"))]
    flags = [word for word in words[1:] if word.startswith("-")]
    rest = [shorter(word) for word in words[1:] if not word.startswith("-") and word != "experiment=demo"]
    named = {item.partition("=")[0] for item in rest}
    names = [] if {"run_name", "sweep_name"} & named else ["run_name=demo"]
    done = run_command([words[0], *flags, *usual, *names, *rest], cwd=folder, timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]


def summary(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "summary.json").read_text())


def found_in(folder: Path, words: list[str]) -> list[str]:
    """Return the words with the tests' files in place of those that a page names."""
    names = {"Qwen/Qwen3-0.6B": "qwen3", "corpus/": "text.jsonl", "web.jsonl.zst": "web.jsonl"}
    for name, own in names.items():
        words = [word.replace(name, f"{folder}/{own}") for word in words]
    return words


def test_branches_and_the_curve_of_one_run_are_made_by_the_commands_of_the_page(folder):
    for words in commands("lengths.md"):
        run(folder, words)
    assert summary(folder, "demo-longer")["steps"] == 64
    assert summary(folder, "demo-90p")["sparsity"] == pytest.approx(0.9, abs=1e-3)
    jobs = sorted((folder / "runs" / "curve").glob("*/summary.json"))
    found = [json.loads(job.read_text()) for job in jobs]
    # The decays are the last 20 % of runs of 10, 20 and 40 steps.
    assert sorted(job["steps"] for job in found) == [10, 20, 40]
    assert {job["branch"]["trunk"] for job in found} == {str(folder / "runs" / "trunk")}


def test_one_page_has_a_command_for_each_thing_that_groups_change():
    model, mixture, megatron, branch, curve = commands("yours.md")
    assert [model] == commands("models.md")
    assert mixture[1] == "data=mixture"
    assert megatron[1:3] == ["data=tokens", "data.path=megatron/text.bin"]
    assert branch in commands("lengths.md")
    assert curve in commands("lengths.md")


def test_a_qwen3_is_continued_at_50_percent_by_the_command_of_the_page(folder):
    folder_of("qwen3", folder / "qwen3")
    words = found_in(folder, commands("yours.md")[0])
    run(folder, [*words, "data.sequence_length=32", "sparsity.window.every=1"])
    found = summary(folder, "qwen3-50p")
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert (folder / "runs" / "qwen3-50p" / "model" / "model.safetensors").is_file()


def test_two_sources_are_mixed_7_to_3_by_the_command_of_the_page(folder):
    (folder / "code").mkdir()
    for name, word in (("web.jsonl", "red"), ("code/a.jsonl", "blue")):
        lines = [json.dumps({"text": f"{word} {number} " * 9}) for number in range(200)]
        (folder / name).write_text("\n".join(lines))
    words = commands("yours.md")[1]
    run(folder, found_in(folder, words))
    config = read_config(folder / "runs" / "mixed" / "config.yaml")
    with contextlib.chdir(folder):
        data = prepare(config.data, config.tokenizer, config.model.vocab_size, 32)
    tokenizer, blocks = load_tokenizer(data.tokenizer), mixture_blocks(data, 1000, seed=0)
    texts = [tokenizer.decode(blocks[place]["input_ids"]) for place in range(1000)]
    assert [sum(word in text for text in texts) for word in ("red", "blue")] == [700, 300]
    # A run of four steps takes 32 blocks of 32 tokens.
    taken = summary(folder, "mixed")["tokens_by_source"]
    assert taken == {
        "web": 32 * sum("red" in text for text in texts[:32]),
        "code": 32 * sum("blue" in t for t in texts[:32]),
    }


def test_megatrons_files_are_trained_on_by_the_command_of_the_page(folder):
    (folder / "megatron").mkdir()
    saved(gpt2(), folder / "tokenizer")
    write_megatron(folder / "megatron")
    run(folder, [*commands("yours.md")[2], "data.sequence_length=16", "data.heldout_share=0.2"])
    assert summary(folder, "megatron")["total_tokens"] == 4 * 8 * 16
