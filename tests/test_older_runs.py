"""Runs that an earlier version, or another version of transformers, began or finished are still read and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.compose import composed
from conf.schema import Config
from train.checkpoints import branch
from train.evaluation import check_evaluation
from train.record.directory import RunDirectory, run_identity
from train.record.read import read_config


def mixture(*overrides: str) -> Config:
    config: Config = composed(
        "train", ["data=mixture", "data.sources=[{path: a.jsonl, weight: 3}, {path: b.jsonl}]", *overrides]
    )
    return config


def saved(config: Config, folder: Path) -> Path:
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder / "config.yaml"


def with_field(config: Config, name: str) -> Config:
    sources = [replace(source, field=name) for source in config.data.sources]
    held_out = [replace(source, field=name) for source in config.eval.sets]
    return replace(config, data=replace(config.data, sources=sources), eval=replace(config.eval, sets=held_out))


def test_a_mixture_whose_config_names_the_usual_field_is_the_same_run(tmp_path):
    now = mixture("eval.sets=[{path: c.jsonl}]")
    saved(with_field(now, "text"), tmp_path)
    assert RunDirectory(tmp_path).finished(now) is None
    assert branch._changes(branch._settings_of("", tmp_path), branch._plain(now)) == {}


def test_a_mixture_of_another_field_is_another_run(tmp_path):
    now = mixture("data.text_field=content")
    saved(with_field(now, "text"), tmp_path)
    with pytest.raises(ValueError, match=r"in use by a run with another config \(data\.sources was"):
        RunDirectory(tmp_path).finished(now)
    assert run_identity(now) == run_identity(with_field(now, "content"))


def test_a_run_of_another_version_of_transformers_is_read(tmp_path):
    config = composed("train", [])
    file = saved(replace(config, trainer=replace(config.trainer, extra={"an_argument_of_old": 1})), tmp_path)
    assert read_config(file).trainer.extra == {"an_argument_of_old": 1}
    with pytest.raises(ValueError, match=r"an_argument_of_old is not an argument of transformers\.TrainingArguments"):
        composed("train", ["+trainer.extra.an_argument_of_old=1"])


def test_a_run_that_began_with_a_held_out_set_keeps_it(monkeypatch):
    asked = []
    monkeypatch.setattr("train.evaluation.check_sets", asked.append)
    config = composed("train", [])
    check_evaluation(config, is_new=False)
    assert asked == []
    check_evaluation(config)
    assert asked == [config]
