"""The configuration tree: everything in it composes, is typed, and has the values that the command line gives."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from conf.compose import composed
from conf.schema import OptimConfig, TrainerConfig
from conf.schema.checks import names_of
from conf.schema.trainer import OWN_KEYS
from tests.commands import ROOT
from train.plan.run import plan_run

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
NEEDS = {
    ("data", "text"): ["data.path=somewhere"],
    ("data", "tokens"): ["data.path=somewhere"],
    ("data", "hub"): ["data.name=somewhere"],
    ("data", "mixture"): ["data.sources=[{path: somewhere, weight: 1.0}]"],
    ("model", "hf"): ["model.path=somewhere"],
}
"""The overrides that a choice needs."""
FOREIGN = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "attn_implementation",
    "project", "entity", "group", "job_type", "tags",
}  # fmt: skip
"""Keys with the names and the meaning that transformers' configs and wandb.init give them."""
GROUPS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_plans(name):
    config = composed("train", [f"experiment={name}"])
    plan = plan_run(config, world_size=8)
    assert plan.batch_size % 8 == 0
    assert plan.run_dir.name == config.run_name or config.run_name is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_opens_with_its_purpose_and_its_command(name):
    head = (CONF / "experiment" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"python -m launch experiment={name}" in head or f"experiment={name}" in head
    assert head.count("\n#") >= 2


@pytest.mark.parametrize(("group", "name"), [pair for pair in GROUPS if pair[0] not in ("experiment", "sweep")])
def test_every_choice_of_every_group_composes(group, name):
    overrides = NEEDS.get((group, name), [])
    command = "eval" if (group, name) == ("data", "wikitext") else "train"
    assert composed(command, [f"{group}={name}", *overrides, *["folder=model"] * (command == "eval")])


@pytest.mark.parametrize(
    ("value", "folder"),
    [
        ("runs/a", "runs/a"),
        ("a/target=0.8,seed=1", "a/target=0.8,seed=1"),
        ("two words", "two words"),
        ("it's", "it's"),
        ('a"b', 'a"b'),
        ("back\\slash\\", "back\\slash\\"),
        ("'a,b'", "a,b"),
    ],
)
def test_a_models_folder_may_be_called_anything(value, folder):
    data = ["data=wikitext", "data.path=x"]
    assert composed("eval", [f"model={value}", *data]).folder == folder
    assert composed("compact", [f"model={value}", f"out={value}"]).out == folder


def test_one_run_or_a_list_are_names_and_nothing_only_where_it_may_be():
    assert names_of("runs/a") == ["runs/a"]
    assert names_of(["a", "b"]) == ["a", "b"]
    assert names_of([], least=0) == []
    for runs, least in (([], 1), ([""], 1), ([3], 0), (None, 0)):
        with pytest.raises(ValueError, match="names nothing"):
            names_of(runs, least)


def test_every_yaml_opens_with_a_comment():
    for path in CONF.rglob("*.yaml"):
        assert path.read_text().startswith("#"), path


def test_trainer_keys_are_names_of_training_arguments():
    known = {field.name for field in fields(TrainingArguments)}
    for config in (TrainerConfig, OptimConfig):
        assert {field.name for field in fields(config)} - {"extra", *OWN_KEYS} <= known


def test_the_optimizer_can_be_set_in_its_group_or_in_the_trainer():
    assert composed("train", ["optim.learning_rate=0.5"]).trainer.learning_rate == 0.5
    assert composed("train", ["trainer.learning_rate=0.5"]).trainer.learning_rate == 0.5


def test_size_target_and_window_are_one_override_each():
    overrides = [
        "model=llama2_1b", "sparsity.target=0.6", "sparsity.window.start=100", "sparsity.window.end=500",
        "sparsity.window.every=100", "trainer.max_steps=1000",
    ]  # fmt: skip
    plan = plan_run(composed("train", overrides), world_size=2)
    assert plan.counts.linear == 1_139_277_824
    assert plan.schedule is not None
    assert list(plan.schedule.events()) == [100, 200, 300, 400, 500]
    assert plan.schedule.density(999) == pytest.approx(0.4)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_the_batch_of_a_step_does_not_depend_on_the_number_of_devices(world_size):
    plan = plan_run(composed("train", ["experiment=demo"]), world_size)
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * world_size == plan.batch_size == 16


def test_a_short_run_still_has_its_window():
    plan = plan_run(composed("train", ["experiment=demo", "trainer.max_steps=40"]), 2)
    assert plan.schedule is not None
    assert plan.schedule.num_events >= 8


def test_all_packages_and_yaml_ship_with_the_distribution():
    text = Path(ROOT / "setup.cfg").read_text()
    listed = text.split("packages =")[1].split("install_requires")[0].split()
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for room in ("conf", "sparsity", "train", "launch", "eval")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert folders == set(listed)


def test_every_key_that_is_no_other_librarys_has_a_sentence():
    known = FOREIGN | {field.name for field in fields(TrainingArguments)}
    silent = []
    for file in sorted((CONF / "schema").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for key, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(key, ast.AnnAssign) and not ast.unparse(key.annotation).startswith("ClassVar"):
                        is_group = ast.unparse(key.annotation).endswith("Config")
                        has_sentence = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                        if not (has_sentence or is_group or ast.unparse(key.target) in known):
                            silent.append(f"{node.name}.{ast.unparse(key.target)}")
    assert not silent
