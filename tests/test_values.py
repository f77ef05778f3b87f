"""Values are taken as typed, and a key that does not exist, is removed or is empty is refused by name."""

from __future__ import annotations

import re

import pytest

from conf.cli import sentence
from conf.compose import composed
from conf.schema import Config
from conf.values import as_typed, override_of, text_of
from launch.plan.request import read_request
from launch.sweep import read_sweep

ODD_TEXTS = [
    "a=b/", "two words", "(a)", "100%", "a:b", "a,b", "$HOME/x", "it's", 'a"b', "ünïcode/文", "back\\slash\\", "[a]", "{a}",
    "a#b", "${ a", "true", "1e3", "0x10", " lead", "a;b|c&d", "'a' and 'b'", "choice(a,b)", "!x", "null/x",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_key_takes_what_was_typed(text):
    config = composed("train", ["data=text", f"data.path={text}", f"prompt={text}", f"init_from={text}"])
    assert (config.data.path, config.prompt, config.init_from) == (text, text, text)
    assert composed("report", ["runs=a", f"title={text}"]).title == text
    assert composed("train", [override_of("run_name", f"{text}x")]).run_name == f"{text}x"


@pytest.mark.parametrize(
    "text", [text for text in ODD_TEXTS if "," not in text and text != " lead"] + ["a:b c=[1]", "C:\\x"]
)
def test_a_sweep_takes_what_was_typed_for_shared_and_for_swept_keys(text):
    sweep = read_sweep(["experiment=demo", f"prompt={text}", f"init_from={text},other"])
    assert [job.config.prompt for job in sweep.jobs] == [text, text]
    assert [job.config.init_from for job in sweep.jobs] == [text, "other"]
    for job in sweep.jobs:
        assert composed("train", job.overrides) == job.config


def test_the_choices_of_a_sweep_may_name_own_methods():
    name = "examples.own_score:Momentum"
    for typed in (f"magnitude,{name}", f"choice(magnitude,{name})", f"'magnitude','{name}'"):
        sweep = read_sweep(["experiment=demo", f"sparsity.score={typed}"])
        assert [job.config.sparsity.score for job in sweep.jobs] == ["magnitude", name]


def test_quotes_null_and_references_mean_what_they_mean_to_hydra():
    config = composed(
        "train", ["prompt='a, b'", "run_name=null", "sweep_name='null'", "logger.project=${model.name}-x"]
    )
    assert (config.prompt, config.run_name, config.sweep_name) == ("a, b", None, "null")
    assert config.logger.project == "llama-tiny-x"


def test_lists_of_texts_take_what_was_typed():
    assert composed("train", ["logger.tags=[a (b),'c, d',e=f]"]).logger.tags == ["a (b)", "c, d", "e=f"]
    assert composed("train", ["logger.tags=[]"]).logger.tags == []
    assert composed("pairs", ["runs=my runs/a=1,b c"]).runs == ["my runs/a=1", "b c"]


def test_a_path_that_starts_with_a_tilde_is_below_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = composed("train", ["data=text", "data.path=~/corpus", "runs_dir=~", "prompt=~/x"])
    assert (config.data.path, config.runs_dir, config.prompt) == ("/home/me/corpus", "/home/me", "~/x")
    assert composed("compact", ["model=~/a", "out=~/b"]).folder == "/home/me/a"
    assert composed("train", ["data=text", "data.path='~/x'"]).data.path == "~/x"


def test_in_a_sweep_commas_outside_quotes_separate_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    sweep = read_sweep(["experiment=demo", "data=text", "data.path=~/a=1,'b,c', d e", "sweep_name=a sweep (2)"])
    assert [job.config.data.path for job in sweep.jobs] == ["/home/me/a=1", "b,c", "d e"]
    assert {job.config.sweep_name for job in sweep.jobs} == {sweep.name} == {"a sweep (2)"}
    assert all(job.config.run_name.startswith("a sweep (2)/data.path-") for job in sweep.jobs)
    for job in sweep.jobs:
        assert composed("train", job.overrides) == job.config


def test_one_run_takes_a_comma_as_text_and_what_is_quoted_once_stays():
    once = as_typed("data.path=a,b", Config)
    assert once == "data.path='a,b'"
    assert as_typed(once, Config) == as_typed(once, Config, is_sweep=True) == once
    assert text_of("'a,b'") == "a,b"
    assert as_typed("sparsity.schedule=choice(cubic,linear)", Config, is_sweep=True).endswith("=choice(cubic,linear)")


def refusal(command: str, *arguments: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the words
        composed(command, arguments)
    said = sentence(error.value)
    assert "\n" not in said
    return said


UNKNOWN = [
    ("train", "+trainer.weight_decey=0.5", "did you mean trainer.weight_decay?"),
    ("train", "++sparsity.targett=0.5", "did you mean sparsity.target?"),
    ("train", "+sparsity.window.ende=3", "did you mean sparsity.window.end?"),
    ("train", "sparsity.window={ende:3}", "did you mean sparsity.window.end?"),
    ("train", "+sparsity.groups=[{include:['*'],target:0.5,tag:1}]", "tag"),
    ("train", "+foo=1", "there is no key foo"),
    ("train", "+learning_rate=1", "learning_rate?"),
    ("eval", "+data.pth=x", "did you mean data.path?"),
    ("compact", "+outt=x", "did you mean out?"),
    ("scaling_law", "+predict.overides=[a]", "did you mean predict.overrides?"),
    ("pairs", "+figur=x", "did you mean figure?"),
    ("report", "+titel=x", "did you mean title?"),
    ("dashboard", "+projekt=x", "did you mean project?"),
    ("plan", "+device_memry=1GB", "did you mean device_memory?"),
]


@pytest.mark.parametrize(("command", "argument", "words"), UNKNOWN)
def test_a_key_that_is_not_in_the_schema_is_refused_however_it_is_set(command, argument, words):
    assert words in refusal(command, argument)


def test_the_plan_and_sweeps_refuse_unknown_keys_too():
    for read in (read_request, read_sweep):
        with pytest.raises(ValueError, match=r"did you mean trainer\.weight_decay\?"):
            read(["experiment=demo", "+trainer.weight_decey=0.5"])


def test_open_keys_stay_open():
    assert composed("train", ["+trainer.extra.neftune_noise_alpha=5"]).trainer.extra == {"neftune_noise_alpha": 5}
    assert (
        "min_lr_rate" not in composed("train", ["~optim.lr_scheduler_kwargs.min_lr_rate"]).trainer.lr_scheduler_kwargs
    )
    assert "+trainer.extra.neftune_noise_alpha=VALUE" in refusal("train", "trainer.extra.neftune_noise_alpha=5")


EMPTY = [
    ("train", ["data=text", "data.path="], "data.path=''"),
    ("train", ["data=text", "data.path=''"], "data.path=''"),
    ("train", ["data=text", "data.path=' '"], "data.path=''"),
    ("train", ["data=text", "data={path: ''}"], "data.path=''"),
    *(("train", [f"{key}="], f"{key}=''") for key in (
        "init_from", "tokenizer", "run_name", "sweep_name", "runs_dir", "data.cache_dir", "prompt", "experiment", "model",
        "trainer.max_steps", "card.license_name", "launch.config_file",
    )),
    ("train", ["logger.tags=[a,]"], "logger.tags=[a,]"),
    ("train", ["logger.tags=['']"], "logger.tags=''"),
    ("eval", ["model=", "data=wikitext"], "model=''"),
    ("compact", ["model=a", "out="], "out=''"),
    ("report", ["runs="], "runs=''"),
    ("report", ["runs=[a,,b]"], "runs=[a,,b]"),
    ("dashboard", ["sweep_name="], "sweep_name=''"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments", "words"), EMPTY)
def test_an_empty_value_is_refused_by_its_key(command, arguments, words):
    said = refusal(command, *arguments)
    assert said.startswith(words)
    assert "is empty" in said


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("~logger", "~logger would remove logger, which is required: give another value, logger=none or wandb."),
        ("~trainer", "trainer=default or gpu"),
        ("~optim.learning_rate", "optim.learning_rate=VALUE"),
        ("~sparsity=geometric", "~sparsity=geometric would remove sparsity"),
        ("~run_name", "would remove run_name"),
        ("~nothing", "there is no key nothing"),
        ("logger=null", "logger has no value: give logger=none or wandb."),
        ("demo", "demo sets nothing: write key=value, like experiment=demo."),
        ("run_name", "run_name sets nothing: write run_name=VALUE."),
        ("trainer.max_steps=(", "trainer.max_steps=( cannot be read: quote text"),
    ],
)
def test_what_removes_or_sets_nothing_is_a_sentence(argument, words):
    assert words in refusal("train", argument)


def test_a_missing_value_is_asked_for_by_its_name():
    assert refusal("eval", "data=wikitext").startswith("model has no value: give model=DIR")
    assert re.match(r"out has no value: give out=DIR", refusal("compact", "model=a"))
