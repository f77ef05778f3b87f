"""Bad input gives one sentence with the value, the rule and the remedy, from one rank, and no traceback."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import SchedulerType, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from conf.cli import sentence
from conf.compose import composed
from conf.schema import tokenizer_of
from conf.schema.passed_on import SCHEDULE_ARGUMENTS, training_argument_types
from launch.command import accelerate_command, num_processes
from tests.commands import run_command
from tests.test_run import tiny, write_text
from train.data.pipeline import prepare
from train.data.tokenizer import train_bpe, wrap_bpe
from train.plan.run import plan_run


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only error line of a command that failed without a traceback."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


CONFIG_MISTAKES = [
    ("sparsity.target=1", "sparsity.target=1.0 is outside [0, 1)"),
    ("sparsity.target=-0.1", "sparsity.target=-0.1 is outside [0, 1)"),
    ("sparsity.target=80", "0.8 for 80 %"),
    ("sparsity.window={start:30,end:10}", "reversed"),
    ("sparsity.window={start:10,end:5000}", "outside a run of 800 steps"),
    ("sparsity.window={start:10,end:20,every:3}", "not divisible by every_steps=3"),
    ("sparsity.window={start:10,end:20,every:0}", "sparsity.window.every=0 must be at least 1"),
    ("sparsity.targt=0.5", "did you mean sparsity.target?"),
    ("trainer.learning_rat=1", "did you mean trainer.learning_rate?"),
    ("trainer.max_steps=many", "trainer.max_steps"),
    ("trainer.max_steps=0", "trainer.max_steps=0 must be at least 1"),
    ("trainer.max_steps=100000000000", "trainer.max_steps=100000000000 is more than 100,000,000 steps"),
    ("sparsity.window.budget=1e12", "sparsity.window.budget=1000000000000.0 must be from 1 to 100,000,000"),
    ("trainer.learning_rate=inf", "trainer.learning_rate=inf must be a number above 0"),
    ("optim.weight_decay=inf", "optim.weight_decay=inf must be finite"),
    ("model=llama_tin", "model=llama_tin is not known: did you mean llama_tiny? There are"),
    ("experiment=dmo", "experiment=dmo is not known: did you mean demo? There are"),
    ("sweep=nothing", "sweep=nothing is not known: choose one of methods,"),
    ("sparsity.target=many", "sparsity.target=many has the wrong type: give a number."),
    ("sparsity.target=null", "sparsity.target=null has the wrong type: give a value, because it cannot be null."),
    ("batch_size=1e3", "batch_size=1e3 has the wrong type: give a whole number."),
    ("overwrite=perhaps", "overwrite=perhaps has the wrong type: give true or false."),
    ("sparsity.include=all", "sparsity.include=all has the wrong type: give a list, [a,b]."),
    ("sparsity.window=late", "sparsity.window=late has the wrong type: give a group of keys, {a:1,b:2}."),
    ("sparsity.factors=0.5", "sparsity.factors=0.5 has the wrong type: give a group of keys, {a:1,b:2}."),
    ("experiment=null", "experiment has no value: give experiment=NAME."),
    ("optim=3", "optim=3 names no choice: give optim=adamw, muon or wsd."),
    ("sparsity=true", "sparsity=true names no choice: give sparsity=NAME."),
    ("=3", "=3 names no key: write key=value"),
    ("model.hidden_size=101", "model.hidden_size=101 must be"),
    ("data=text", "data=text needs data.path"),
    ("data.path=corpus", "data=pydocs reads the docstrings of this Python"),
    ("prompt=''", "prompt='' is empty"),
    ("sparsity.include=[model.nothing.*]", "matches no parameter"),
    ("data.heldout_share=1.5", "data.heldout_share=1.5 is outside (0, 1)"),
    ("data.sequence_length=4096", "data.sequence_length=4096 is longer than the model's context"),
    ("launch.num_processes=0", "launch.num_processes=0 must be at least 1"),
    ("launch.num_processes=7", "cannot be divided among 7 processes"),
    ("launch.config_file=nowhere.yaml", "launch.config_file=nowhere.yaml does not exist"),
    ("run_name=../outside", "is outside the runs folder"),
    ("resume=maybe", "resume=maybe is not known"),
    ("optim.optim=sgdx", "optim.optim=sgdx is not known: did you mean sgd?"),
    ("trainer.optim=adamw_torch_fuse", "did you mean adamw_torch_fused?"),
    ("optim.lr_scheduler_type=cosin", "optim.lr_scheduler_type=cosin is not known: did you mean cosine?"),
    ("trainer.save_strategy=best", "trainer.save_strategy=best is not known: choose one of no, steps, epoch."),
    ("trainer.eval_strategy=step", "did you mean steps?"),
    ("trainer.torch_compile_mode=fast", "trainer.torch_compile_mode=fast is not known"),
    ("trainer.torch_compile_mode=reduce-overhead", "trainer.torch_compile_mode=reduce-overhead is not known"),
    ("trainer.logging_steps=0", "trainer.logging_steps=0.0 must be above 0"),
    ("trainer.dataloader_num_workers=-1", "trainer.dataloader_num_workers=-1 must be from 0"),
    ("trainer.seed=-1", "trainer.seed=-1 must be from 0"),
    ("optim.adam_beta2=2", "optim.adam_beta2=2.0 is outside [0, 1)"),
    ("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be at least 0"),
    ("export.max_shard_size=big", "export.max_shard_size=big is not a file size"),
]


@pytest.mark.parametrize(("override", "message"), CONFIG_MISTAKES)
def test_a_mistake_in_the_config_is_said_in_a_sentence_before_any_process_starts(override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        command_for(["experiment=demo", override])
    assert "\n" not in sentence(refusal.value)


def command_for(overrides: list[str]) -> list[str]:
    """Do what `python -m launch` does before it starts anything, and return the command."""
    config = composed("train", overrides)
    plan_run(config, num_processes(config, gpus=0))
    return accelerate_command(config, overrides, gpus=0)


@pytest.mark.parametrize(
    ("override", "word"), [("sparsity.targt=0.5", "sparsity.target?"), ("launch.config_file=nowhere.yaml", "nowhere")]
)
def test_the_launcher_says_it_on_one_line_and_makes_nothing(override, word, tmp_path):
    done = run_command(["launch", "experiment=demo", override], cwd=tmp_path)
    assert word in the_error(done)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["launch", "train", "eval", "launch.plan"])
def test_every_command_names_a_mistyped_key(module, tmp_path):
    assert "data.heldout_shar" in the_error(run_command([module, "data.heldout_shar=0.5"], cwd=tmp_path))


def test_bad_data_is_named_by_one_rank_and_leaves_no_run(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps({"text": "words " * 30})] * 11 + ['{"text": ']))
    done = run_command(["launch", *tiny(tmp_path, f"data.path={path}")])
    assert "bad.jsonl, line 12" in the_error(done)
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


def test_what_only_the_ranks_can_find_is_said_once(tmp_path):
    done = run_command(["launch", *tiny(tmp_path, "+trainer.extra.hub_strategy=sometimes")])
    assert "trainer.extra={'hub_strategy': 'sometimes'} is refused by transformers: sometimes is not" in the_error(done)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.extra.neftune_noise_alph=1", "did you mean neftune_noise_alpha?"),
        ("trainer.extra.neftune_noise_alpha=abc", 'neftune_noise_alpha="abc" has the wrong type: give float | null.'),
        ("trainer.extra.neftune_noise_alpha=true", "neftune_noise_alpha=true has the wrong type: give float | null."),
        (
            "trainer.extra.torch_empty_cache_steps=2.5",
            "torch_empty_cache_steps=2.5 has the wrong type: give int | null.",
        ),
        ("trainer.extra.ignore_data_skip=1", "trainer.extra.ignore_data_skip=1 has the wrong type: give bool."),
        ("trainer.extra.include_for_metrics=loss", 'include_for_metrics="loss" has the wrong type: give list[str].'),
        ("trainer.extra.hub_strategy=3", "trainer.extra.hub_strategy=3 has the wrong type: give HubStrategy | str."),
        (
            "trainer.extra.liger_kernel_config=[]",
            "liger_kernel_config=[] has the wrong type: give dict[str, bool] | null.",
        ),
        ("trainer.extra.output_dir=x", "trainer.extra.output_dir is set by the framework itself: remove it."),
        ("optim.lr_scheduler_kwargs.min_lr_rat=1", "lr_scheduler_type=cosine_with_min_lr: did you mean min_lr_rate?"),
        (
            "optim.lr_scheduler_kwargs.wave=1",
            "lr_scheduler_kwargs.wave does not fit optim.lr_scheduler_type=cosine_with_min_lr",
        ),
        ("optim.lr_scheduler_kwargs.num_cycles=many", 'num_cycles="many" has the wrong type: give float.'),
    ],
)
def test_what_is_passed_on_to_transformers_is_checked_while_composing(override, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the words say which
        composed("train", [f"+{override}"])
    assert words in sentence(refusal.value)


def test_what_transformers_takes_is_passed_on():
    settings = [
        "torch_empty_cache_steps=2",
        "ddp_bucket_cap_mb=null",
        "neftune_noise_alpha=5",
        "debug=underflow_overflow",
    ]
    extra = composed("train", [f"+trainer.extra.{setting}" for setting in settings]).trainer.extra
    assert extra == {
        "torch_empty_cache_steps": 2, "ddp_bucket_cap_mb": None, "neftune_noise_alpha": 5, "debug": "underflow_overflow",
    }  # fmt: skip


def test_the_names_and_types_of_what_is_passed_on_are_those_of_transformers():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(training_argument_types()) == fields
    for schedule, expected in SCHEDULE_ARGUMENTS.items():
        found = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]).parameters
        own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        assert {*found} - own == {*expected}, schedule


def test_a_batch_that_is_more_than_the_text_is_said_once_by_rank_0(tmp_path):
    write_text(tmp_path / "text.jsonl")
    done = run_command(["launch", *tiny(tmp_path, "batch_size=1000000", "logger=none")])
    assert re.match(
        r"error: batch_size=1000000 is larger than the number of training blocks, \d+: give more text", the_error(done)
    )
    assert done.returncode == 2


def refusal_of_data(folder: Path, *overrides: str) -> str:
    config = composed("train", tiny(folder, *overrides))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the callers look at the words
        prepare(config.data, tokenizer_of(config), config.model.vocab_size, config.model.max_position_embeddings)
    return sentence(refusal.value)


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "words"}))
    assert "less than one block of 32" in refusal_of_data(tmp_path)


def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.hub.is_reachable", lambda: False)
    write_text(tmp_path / "text.jsonl")
    assert "tokenizer=nobody/nothing" in refusal_of_data(tmp_path, "tokenizer=nobody/nothing")


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    train_bpe(["some words to train on " * 20], 270, tmp_path / "tokenizer.json")
    wrap_bpe(tmp_path / "tokenizer.json", 32).save_pretrained(tmp_path / "tokenizer")
    write_text(tmp_path / "text.jsonl")
    error = refusal_of_data(tmp_path, f"tokenizer={tmp_path}/tokenizer", "model.vocab_size=100")
    assert "vocab_size=100" in error


@pytest.mark.parametrize(("number", "remedy"), [(28, "free some space"), (13, "you may write to"), (30, "read-only")])
def test_errors_of_the_file_system_name_path_and_remedy(number, remedy):
    said = sentence(OSError(number, os.strerror(number), "runs/demo/config.yaml"))
    assert "runs/demo/config.yaml" in said
    assert remedy in said


@pytest.mark.parametrize(("name", "message"), [("max_steps", "set trainer.max_steps"), ("output_dir", "remove it")])
def test_an_extra_name_cannot_undo_what_the_plan_says(name, message):
    with pytest.raises(ValueError, match=message):
        composed("train", [f"+trainer.extra.{name}=1"])


def test_a_process_that_belongs_to_no_world_is_refused(tmp_path):
    done = run_command(["train", *tiny(tmp_path)], ACCELERATE_USE_FSDP="true")
    assert "a single process without a process group" in the_error(done)
    assert not (tmp_path / "runs").exists()


def test_a_world_smaller_than_accelerate_was_asked_for_is_refused(monkeypatch):
    """Plain accelerate does this on CPUs: each process believes that it is alone."""
    import train.distributed as distributed

    alone = SimpleNamespace(num_processes=1, process_index=0, distributed_type="NO", device="cpu")
    monkeypatch.setattr(distributed, "PartialState", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="asked for 2 processes but set up a world of 1"):
        distributed.join_world(60)


def test_a_world_without_fsdp2_is_refused_where_it_was_asked_for(monkeypatch):
    from train.distributed import check_fsdp2

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    without = SimpleNamespace(is_fsdp2=False, distributed_type=SimpleNamespace(value="MULTI_CPU"))
    with pytest.raises(ValueError, match=r"FSDP2 was asked for, but accelerate .* set up MULTI_CPU"):
        check_fsdp2(without)


def test_more_processes_in_the_config_than_were_started_are_refused(tmp_path):
    done = run_command(["train", *tiny(tmp_path, "launch.num_processes=2")])
    assert "launch.num_processes=2, but 1 was started" in the_error(done)
