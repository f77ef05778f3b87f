"""A model over several ranks: it has the same figures as in one process, and every rank reads only its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from conf.compose import composed
from eval.model.load import load_model
from eval.model.perplexity import evaluate
from eval.model.shards import file_names
from sparsity.compact import compact_folder
from sparsity.shards import local_tensor
from tests.commands import ROOT, quiet_environment
from tests.distributed import run_ranks
from tests.small_models import gpt2, llama, prune, saved
from train.distributed import World

FIGURES = ("token_perplexity", "token_perplexity_stride512", "word_perplexity", "bits_per_byte")
MODELS = {
    "llama": lambda: llama(),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2, tied, odd sizes": lambda: gpt2(n_embd=20, vocab_size=301),
    "bfloat16": lambda: llama().bfloat16(),
}


def overrides(folder: str) -> list[str]:
    return [f"folder='{folder}'", "data=wikitext", f"data.path='{Path(folder).parent / 'text.raw'}'"]


def figures_in_shards(folders: list[str], whole_first: bool) -> list[tuple[dict[str, Any], float]]:
    """Return the figures of each folder's model, and the share of its weights that this rank held."""
    import eval.model.load as load

    load.wants_fsdp = lambda: True
    if whole_first:
        import eval.model.shards as shards

        shards.file_names = lambda *_: None
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    found = []
    for folder in folders:
        figures = evaluate(composed("eval", overrides(folder)), world)
        model = load_model(folder, AutoConfig.from_pretrained(folder), "auto", world)
        params = list(model.parameters())
        assert all(isinstance(param, DTensor) for param in params)
        held = sum(local_tensor(param).numel() for param in params)
        found.append((figures, held / sum(param.numel() for param in params)))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    found = []
    for name, build in MODELS.items():
        model = build()
        prune(model, 0.3)
        folder = tmp_path_factory.mktemp(name.split(",")[0]) / "model"
        found.append(str(saved(model, folder, max_shard_size="20KB")))
    compact = Path(found[0]).with_name("compact")
    compact_folder(found[0], compact)
    return [*found, str(compact)]


@pytest.mark.parametrize(
    ("whole_first", "which"), [(False, slice(None)), (True, slice(2, 3))], ids=["rows", "whole first"]
)
def test_shards_give_the_figures_and_zeros_of_one_process(folders, whole_first, which):
    folders = folders[which]
    alone = World(0, 1, torch.device("cpu"))
    ranks = run_ranks(figures_in_shards, 2, folders, whole_first, timeout_s=240)
    for index, folder in enumerate(folders):
        expected = evaluate(composed("eval", overrides(folder)), alone)
        for rank in ranks:
            figures, share = rank[index]
            assert 0.4 < share < 0.6
            for name in FIGURES:
                # In bfloat16 a sum in another order has another value.
                tolerance = 1e-2 if expected["dtype"] == "bfloat16" else 1e-5
                assert figures[name] == pytest.approx(expected[name], rel=tolerance)
            same = ("zero_linear_params", "layer_zeros", "dtype", "text_sha256", "num_windows")
            assert {name: figures[name] for name in same} == {name: expected[name] for name in same}


def test_weights_are_found_with_and_without_the_prefix_of_the_base_model():
    model = gpt2()
    full = {name: None for name, _ in model.named_parameters()}
    bare = {name.removeprefix("transformer."): None for name in full}
    assert file_names(model, full) == {name: name for name in full}
    assert file_names(model, bare) == {name: name.removeprefix("transformer.") for name in full}
    assert file_names(model, {"other": None}) is None


def test_accelerate_launches_the_command_on_two_ranks(folders):
    import subprocess
    import sys

    command = ["accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml", "-m", "eval"]
    arguments = [f"model={folders[0]}", *overrides(folders[0])[1:], "format=json"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *arguments],
        cwd=ROOT, env=quiet_environment({}), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    alone = evaluate(composed("eval", overrides(folders[0])), World(0, 1, torch.device("cpu")))
    assert figures["world_size"] == 2
    for name in FIGURES:
        assert figures[name] == pytest.approx(alone[name], rel=1e-5)
    assert figures["zero_linear_params"] == alone["zero_linear_params"]
