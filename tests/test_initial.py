"""A run that starts from a finished model: the model's zeros stay zero, and a window prunes further weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity.callback import SparsityCallback
from sparsity.compact import compact_folder
from sparsity.compact.contents import METHOD
from sparsity.schedule import Fixed, Geometric
from tests.commands import run_command
from tests.interrupted import interrupted
from tests.test_run import tiny
from tests.wandb_file import read_records
from train.model.initial import load_initial_weights
from train.plan.config_json import COMPACT


def small(hidden_size: int = 16) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"], ids=["one file", "many files"])
def test_every_weight_comes_over_from_a_transformers_folder(tmp_path, max_shard_size):
    source, target = small(), small()
    source.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    load_initial_weights(target, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_a_folder_of_another_model_or_of_none_is_refused_in_a_sentence(tmp_path):
    small(32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the configured model"):
        load_initial_weights(small(), str(tmp_path))
    with pytest.raises(ValueError, match=r"does not exist: give a transformers folder or a hub name"):
        load_initial_weights(small(), str(tmp_path / "nowhere"))
    small().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match="cannot be read"):
        load_initial_weights(small(), str(tmp_path))


def test_a_compact_folder_is_refused_with_the_command_that_makes_it_plain(tmp_path):
    small().save_pretrained(tmp_path / "plain")
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    with pytest.raises(ValueError, match=r"is compact: .* expand=true"):
        load_initial_weights(small(), str(tmp_path / "compact"))


def test_a_pickled_folder_is_never_opened(tmp_path):
    small().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(small().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as a pickle .* save them as safetensors first"):
        load_initial_weights(small(), str(tmp_path))


@pytest.mark.parametrize(("schedule", "expected"), [(Fixed(), 0.5), (Geometric(0.8, 0, 4, 1), 0.2)])
def test_events_prune_only_beyond_the_zeros_that_were_inherited(schedule, expected):
    model = small()
    with torch.no_grad():
        model.lm_head.weight.view(-1)[::2] = 0
    callback = SparsityCallback(schedule, include=["lm_head.weight"], keep_zeros=True)
    callback.bind(model)
    callback.pruner.inherit()
    assert callback.density == 0.5
    densities = []
    for step in range(6):
        if step in schedule.events() and schedule.density(step) < callback.density:
            callback.pruner.prune(schedule.density(step))
        densities.append(callback.density)
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == pytest.approx(expected, abs=1e-3)
    assert not model.lm_head.weight.view(-1)[::2].any()


def test_a_run_keeps_the_masks_of_the_model_it_starts_from(folder, whole):
    command = interrupted(
        folder, "second", "logger=wandb", "sparsity=dense", f"init_from={whole}/model", "trainer.max_steps=8"
    )
    command = [item for item in command if not item.startswith("sparsity.")]
    done = run_command(["launch", *command])
    assert done.returncode == 0, done.stderr[-3000:]
    (shown,) = whole.with_name("second").glob("wandb/offline-run-*/*.wandb")
    kinds = [record.run.job_type for record in read_records(shown) if record.WhichOneof("record_type") == "run"]
    assert set(kinds) == {"sparse"}
    before, after = (load_file(Path(run) / "model" / "model.safetensors") for run in (whole, whole.with_name("second")))
    for name, tensor in before.items():
        if "proj" in name or name == "lm_head.weight":
            assert torch.equal(after[name] == 0, tensor == 0), name
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_a_run_on_other_text_reads_it_with_the_tokenizer_of_the_model_it_starts_from(tmp_path, whole):
    lines = [json.dumps({"text": f"Tale {number}: " + "orange violet umber " * 40}) for number in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    command = tiny(tmp_path, f"init_from={whole}/model", "sparsity=dense", "trainer.max_steps=2", "logger=none")
    done = run_command(["launch", *command])
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = (Path(run) / "model" / "tokenizer.json" for run in (whole, tmp_path / "runs" / "tiny"))
    assert json.loads(ours.read_text())["model"]["vocab"] == json.loads(theirs.read_text())["model"]["vocab"]


def test_the_plan_knows_a_compact_folder_by_the_name_that_the_format_writes():
    assert COMPACT == METHOD
