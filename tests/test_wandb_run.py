"""The group, job type and tags by which a run is found in wandb."""

from __future__ import annotations

import pytest

from conf.compose import composed
from train.plan.run import plan_run
from train.record.wandb_key import has_wandb_key
from train.record.wandb_run import kind_of_run, run_tags


def kind_and_tags(*overrides: str, initial_sparsity: float = 0.0) -> tuple[str, list[str]]:
    config = composed("train", ["model=llama_tiny", "trainer.max_steps=1000", *overrides])
    plan = plan_run(config, 1)
    return kind_of_run(plan, initial_sparsity), run_tags(config, plan, initial_sparsity)


def test_a_sparse_a_dense_and_a_twin_run_have_job_types_and_tags_of_their_own():
    assert kind_and_tags("sparsity.target=0.8") == ("sparse", ["llama-tiny", "sparsity-80"])
    assert kind_and_tags("sparsity=dense") == ("dense", ["llama-tiny", "dense"])
    assert kind_and_tags("sparsity.target=0.625", "model.match=average") == (
        "twin", ["llama-tiny", "twin", "twin-of-sparsity-62.5"],
    )  # fmt: skip


def test_a_run_that_keeps_the_zeros_it_starts_from_is_sparse_and_one_with_a_chance_zero_is_not():
    fixed = ["sparsity=dense", "init_from=model"]
    assert kind_and_tags(*fixed, initial_sparsity=0.7) == ("sparse", ["llama-tiny", "sparsity-70"])
    assert kind_and_tags(*fixed, initial_sparsity=1e-9) == ("dense", ["llama-tiny", "dense"])
    assert kind_and_tags("sparsity.target=0.8", initial_sparsity=0.5)[1] == ["llama-tiny", "sparsity-80"]
    twin = kind_and_tags("sparsity.target=0.8", "model.match=average", initial_sparsity=0.9)
    assert twin == ("twin", ["llama-tiny", "twin", "twin-of-sparsity-80"])


def test_a_run_that_is_sparse_by_groups_is_tagged_with_its_overall_sparsity():
    groups = ["sparsity.target=0", "sparsity.groups=[{include:['*.mlp.*'],target:0.5}]"]
    config = composed("train", ["model=llama_tiny", "trainer.max_steps=1000", *groups])
    plan = plan_run(config, 1)
    level = f"sparsity-{100 * plan.num_pruned / plan.num_prunable:.4g}"
    assert level not in ("sparsity-0", "sparsity-50")
    assert kind_and_tags(*groups) == ("sparse", ["llama-tiny", level])
    assert kind_and_tags(*groups, "model.match=average")[1][1:] == ["twin", f"twin-of-{level}"]


def test_tags_of_the_config_come_behind_each_once_and_no_longer_than_wandb_takes():
    long = "x" * 70
    _, tags = kind_and_tags("sparsity.target=0.5", f"logger.tags=[seed-1,sparsity-50,{long}]")
    assert tags == ["llama-tiny", "sparsity-50", "seed-1", "x" * 64]


@pytest.mark.parametrize(
    ("netrc", "key", "expected"),
    [
        ("", "", False),
        ("machine api.wandb.ai login user password k", "", True),
        ("", "k", True),
        ("not a netrc", "", False),
    ],
)
def test_a_key_is_found_in_the_environment_or_in_netrc(tmp_path, monkeypatch, netrc, key, expected):
    (tmp_path / ".netrc").write_text(netrc)
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert has_wandb_key() is expected
