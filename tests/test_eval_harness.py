"""Our figures equal those of lm-evaluation-harness, run offline on a local file; `make test-cluster` installs it."""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.compose import composed
from eval.model.perplexity import evaluate
from eval.model.wikitext import read_wikitext
from tests.commands import SHARED
from tests.small_models import llama, saved
from train.data import load_tokenizer
from train.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
GOLDEN = Path(__file__).with_name("lm_eval_wikitext.json")
LLAMA_2 = SHARED / "data" / "llama2.tokenizer.model"
TASK = """task: local_wikitext
dataset_path: json
dataset_kwargs:
  data_files:
    test: {pages}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function {rules}.wikitext_detokenizer
process_results: !function {rules}.process_results
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def trained(steps: int = 30, **changes: Any) -> Any:
    """Return a model trained for a few steps on a fixed text, so that its figures have a usual size."""
    model = llama(initializer_range=0.05, **changes).train()
    ids = torch.arange(4 * 24).view(4, 24) * 7 % model.config.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def with_task(folder: Path) -> Path:
    """Write a task with the harness's own rules on the pages of `text.raw`, which needs no network."""
    from lm_eval.tasks.wikitext import preprocess_wikitext

    tasks = folder.parent / "tasks"
    tasks.mkdir(exist_ok=True)
    source = Path(preprocess_wikitext.__file__).read_text()
    (tasks / "rules.py").write_text(source)
    data = composed("eval", [f"folder={folder}", "data=wikitext", f"data.path='{folder.parent}/text.raw'"]).data
    pages = read_wikitext(data).pages
    (tasks / "pages.jsonl").write_text("".join(f"{json.dumps({'page': page})}\n" for page in pages))
    (tasks / "task.yaml").write_text(TASK.format(pages=tasks / "pages.jsonl", rules="rules"))
    return tasks


def both(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (our figures, the harness's figures) of a folder, both computed by our command."""
    common = [f"folder='{folder}'", *overrides]
    own = evaluate(composed("eval", [*common, "data=wikitext", f"data.path='{folder.parent}/text.raw'"]), ALONE)
    tasks = with_task(folder)
    theirs = evaluate(composed("eval", [*common, "tasks=[local_wikitext]", f"task_path='{tasks}'"]), ALONE)
    return own, theirs["tasks"]["local_wikitext"]


def harness_is_there() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")


@pytest.mark.cluster
def test_word_perplexity_is_the_harness_own_with_a_byte_level_tokenizer(tmp_path):
    harness_is_there()
    own, theirs = both(saved(trained(), tmp_path / "model"))
    assert own["word_perplexity"] == pytest.approx(theirs["word_perplexity"], rel=1e-4)
    assert 1.0 < own["word_perplexity"] < math.inf


@pytest.mark.cluster
@pytest.mark.skipif(not LLAMA_2.is_file(), reason="../shared/data/llama2.tokenizer.model is not there")
@pytest.mark.parametrize("adds_bos", [False, True])
def test_word_perplexity_is_the_harness_own_with_the_llama_2_tokenizer(adds_bos, tmp_path):
    harness_is_there()
    folder = saved(trained(steps=5, vocab_size=32000), tmp_path / "model")
    tokenizer = load_tokenizer(str(LLAMA_2))
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own, theirs = both(folder, f"tokenizer='{tmp_path}/tokenizer'")
    assert own["word_perplexity"] == pytest.approx(theirs["word_perplexity"], rel=1e-4)
    assert own["pages_begin_with"] == ["<s>"] * (1 + adds_bos)


@pytest.mark.cluster
def test_a_task_that_nobody_has_is_named(tmp_path, capsys):
    harness_is_there()
    folder = saved(llama(), tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    with pytest.raises(SystemExit):
        evaluate(composed("eval", [f"folder='{folder}'", "tasks=[no_such]", f"task_path='{tmp_path}/tasks'"]), ALONE)
    assert "tasks=['no_such'] are not known to lm-evaluation-harness" in capsys.readouterr().err


@pytest.mark.cluster
def test_a_task_without_its_data_is_said_in_one_sentence(tmp_path, capsys):
    harness_is_there()
    folder = saved(llama(), tmp_path / "model")
    (with_task(folder) / "pages.jsonl").unlink()
    with pytest.raises(SystemExit):
        evaluate(
            composed("eval", [f"folder='{folder}'", "tasks=[local_wikitext]", f"task_path='{tmp_path}/tasks'"]), ALONE
        )
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "could not be run" in said[0]


def test_without_the_harness_the_remedy_is_said(monkeypatch):
    from eval.model.harness import check_tasks

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"not installed: pip install '\.\[eval\]'"):
        check_tasks(composed("eval", ["folder=x", "tasks=[without_the_harness]"]))


def test_the_harness_takes_logarithms_in_float32(monkeypatch):
    """By default it takes them in the logits' type, and in bfloat16 log-probabilities near 8 have steps of 0.03."""
    from eval.model import harness
    from train import harness as shared

    asked: dict[str, Any] = {}
    fakes = {
        "lm_eval": SimpleNamespace(simple_evaluate=lambda *args, **options: {"results": {"task": {"acc,none": 0.5}}}),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **options: asked.update(options)),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(shared, "_manager", lambda *args: None)
    found = harness.run_tasks(composed("eval", ["folder=x", "tasks=[task]"]), None, None, 32, 1)
    assert asked["softmax_dtype"] == "float32"
    assert found["tasks"] == {"task": {"acc": 0.5}}


def test_word_perplexity_is_what_the_harness_measured(tmp_path):
    """The harness's figure for this model was measured by `python -m tests.test_eval_harness` on a machine that has it."""
    golden = json.loads(GOLDEN.read_text())
    folder = saved(llama(), tmp_path / "model")
    own = evaluate(composed("eval", [f"folder='{folder}'", "data=wikitext", f"data.path='{tmp_path}/text.raw'"]), ALONE)
    assert own["word_perplexity"] == pytest.approx(golden["word_perplexity"], rel=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        own, theirs = both(saved(llama(), Path(scratch) / "model"))
        measured = {
            "command": "python -m tests.test_eval_harness",
            "lm_eval": version("lm_eval"),
            "torch": torch.__version__.split("+")[0],
            "word_perplexity": theirs["word_perplexity"],
        }
        GOLDEN.write_text(json.dumps(measured, indent=2) + "\n")
        print(f"own {own['word_perplexity']}, lm-evaluation-harness {theirs['word_perplexity']}")
