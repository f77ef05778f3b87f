"""The commands of docs/models.md and docs/lengths.md, run as printed there, but on a model and text that take seconds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.architectures import folder_of
from tests.commands import ROOT, run_command
from tests.tiny_run import tiny, write_text

pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]
SHORTER = {"320": "32", "640": "64", "160": "16", "240": "24", "80": "8", "60": "6", "20": "3", "10": "2", "10000": "4"}
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
        for item in tiny(folder, "logger=none", "launch.num_processes=1")
        if not item.startswith(("run_name", "runs_dir"))
    ]
    # The length of a decay depends on where it branches.
    own = {item.partition("=")[0] for item in words} | ({"trainer.max_steps"} if "sweep=wsd_curve" in words else set())
    usual = [item for item in usual if item.partition("=")[0] not in own]
    if "model=hf" in words:
        usual = [item for item in usual if not item.startswith("model.")]
    flags = [word for word in words[1:] if word.startswith("-")]
    rest = [shorter(word) for word in words[1:] if not word.startswith("-") and word != "experiment=demo"]
    named = {item.partition("=")[0] for item in rest}
    names = [] if {"run_name", "sweep_name"} & named else ["run_name=demo"]
    done = run_command([words[0], *flags, *usual, *names, *rest], cwd=folder, timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]


def summary(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "summary.json").read_text())


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


def test_a_qwen3_is_continued_at_50_percent_by_the_command_of_the_page(folder):
    qwen = folder_of("qwen3", folder / "qwen3")
    (words,) = commands("models.md")
    replaced = [word.replace("Qwen/Qwen3-0.6B", str(qwen)).replace("corpus/", f"{folder}/text.jsonl") for word in words]
    run(folder, [*replaced, "data.sequence_length=32", "sparsity.window.every=1"])
    found = summary(folder, "qwen3-50p")
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert (folder / "runs" / "qwen3-50p" / "model" / "model.safetensors").is_file()
