"""Held-out sets by name and tasks of lm-evaluation-harness, in a run and at its end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.compose import composed
from tests.commands import run_command
from tests.distributed import run_ranks
from tests.small_models import llama, saved
from tests.tiny_run import tiny, write_text
from train.data import load_tokenizer
from train.distributed import World
from train.evaluation import check_evaluation
from train.harness import run_tasks

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def write_task(folder: Path, name: str = "colours", count: int = 9) -> Path:
    """Write a task with questions of different lengths, so that sorting by length mixes the ranks' shares."""
    folder.mkdir(exist_ok=True)
    questions = [
        {"question": "red " * (1 + number % 4), "choices": ["green", "blue", "grey pink"], "answer": number % 3}
        for number in range(count)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "task.yaml").write_text(TASK.format(name=name, file=folder / "questions.jsonl"))
    return folder


@pytest.mark.timeout(600)
def test_a_run_logs_its_sets_and_tasks_by_name_as_it_trains_and_at_its_end(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    lines = write_text(tmp_path / "text.jsonl").read_text().splitlines()
    (tmp_path / "code.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "odd.txt").write_text("quite another text. " * 40)
    sets = f"[{{path:{tmp_path}/code.jsonl}},{{path:{tmp_path}/odd.txt,name:prose}}]"
    tasks = write_task(tmp_path / "tasks")
    done = run_command(
        ["launch", *tiny(tmp_path), "logger=none", "eval.every=10", f"eval.sets={sets}", "eval.tasks=[colours]",
         f"eval.task_path={tasks}", "eval.limit=6"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {record["train/global_step"]: record for record in records if "eval/loss" in record}
    assert sorted(evaluated) == [10, 20, 24]
    for record in evaluated.values():
        assert {"eval/code/loss", "eval/prose/loss", "eval/prose/bits_per_byte", "eval/colours/acc"} <= record.keys()
        # The model has never seen text of this kind.
        assert record["eval/prose/bits_per_byte"] > record["eval/code/bits_per_byte"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval"]["code/loss"] == evaluated[24]["eval/code/loss"] < evaluated[10]["eval/code/loss"]
    assert summary["heldout_loss"] == evaluated[24]["eval/loss"]


def accuracy(folder: Path, tasks: Path, alone: bool) -> dict[str, Any]:
    world = World(0, 1, torch.device("cpu"))
    if not alone:
        world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    model, tokenizer = llama(), load_tokenizer(str(folder))
    before = torch.random.get_rng_state()
    found = run_tasks(["colours"], str(tasks), model, tokenizer, context=32, batch_size=2, world=world, prefix="eval.")
    assert torch.equal(torch.random.get_rng_state(), before)
    return found


@pytest.mark.timeout(600)
def test_two_ranks_share_a_tasks_examples_and_agree_with_one(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    folder, tasks = saved(llama(), tmp_path / "model"), write_task(tmp_path / "tasks")
    alone = accuracy(folder, tasks, True)
    assert 0 < alone["colours"]["acc"] < 1
    for found in run_ranks(accuracy, 2, folder, tasks, False, timeout_s=400):
        assert found == alone


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.every=0"], "eval.every=0 must be at least 1 step"),
        (["eval.limit=0"], "eval.limit=0 must be at least 1 example"),
        (["eval.sets=[{path:a},{path:b/a.txt}]"], "eval.sets and eval.tasks have two called a: give one of them"),
        (["eval.task_path=x"], "eval.task_path=x holds tasks: name those to run in eval.tasks"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(overrides, words):
    with pytest.raises(ValueError, match=words):
        composed("train", overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.sets=[{{path:{folder}/gone.jsonl}}]", "gone.jsonl does not exist"),
        (
            "eval.sets=[{{path:{folder}/text.jsonl,name:own}}]",
            "eval.sets: own reads {folder}/text.jsonl, which the run trains",
        ),
    ],
)
def test_a_run_checks_its_sets_before_its_text_is_prepared(tmp_path, override, words):
    write_text(tmp_path / "text.jsonl")
    config = composed("train", tiny(tmp_path, override.format(folder=tmp_path)))
    with pytest.raises(ValueError, match=re.escape(words.format(folder=tmp_path))):
        check_evaluation(config)


def test_a_task_that_does_not_exist_is_refused_by_name(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    write_text(tmp_path / "text.jsonl")
    tasks = write_task(tmp_path / "tasks")
    config = composed("train", tiny(tmp_path, "eval.tasks=[colors]", f"eval.task_path={tasks}"))
    with pytest.raises(ValueError, match=r"eval\.tasks=\['colors'\] are not known to lm-evaluation-harness"):
        check_evaluation(config)
