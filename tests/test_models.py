"""Any causal language model of transformers, given by its config.json: its counts, prunable weights, reading and refusals."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conf.compose import composed
from conf.schema import ModelConfig, SparsityConfig
from eval.model.zeros import count_zeros
from sparsity import Geometric, SparsityCallback
from sparsity.compact.folder import compact_folder
from tests.architectures import CONFIGS, by_path, folder_of
from tests.distributed import run_ranks
from tests.ranks_of_a_run import FSDP2
from train.distributed import World, join_world
from train.model.build import build_model, build_skeleton
from train.model.export import export_model, full_names, full_tensor
from train.model.initial import initial_weights, load_initial_weights
from train.model.initial_check import check_tokenizer_of_path
from train.model.stored import stored_form
from train.model.weights import allocate, draw_weights, shard_and_allocate
from train.plan.architecture import describe, resolved
from train.plan.config_json import hf_config
from train.plan.counts import count_parameters, flops_per_token
from train.plan.host_memory import host_memory
from train.plan.names import dense_words, prunable_shapes
from train.plan.run import plan_run
from train.plan.twin import dense_twin

DENSE = {
    "llama3": "model.embed_tokens.weight",
    "gemma3": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight, transformer.wpe.weight",
}
"""The matrices that stay dense. In all other architectures it is only the embedding; their separate head is pruned."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: folder_of(name, base / name) for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_counts_what_the_model_has_and_prunes_what_the_run_does(folders, name):
    model = resolved(by_path(folders[name]))
    real = AutoModelForCausalLM.from_pretrained(folders[name])
    counts = count_parameters(model)
    assert counts.total == sum(param.numel() for param in real.parameters())
    shapes = {name: tuple(param.shape) for name, param in real.named_parameters()}
    pruned = prunable_shapes(model, SparsityConfig(target=0.5))
    matrices = {key: shape for key, shape in shapes.items() if len(shape) > 1}
    words = dense_words(shapes, pruned).split(", ")
    dense = DENSE.get(name, "model.embed_tokens.weight").split(", ")
    assert words[:-2] == dense
    assert words[-2].endswith("vectors (norms")
    assert pruned == {key: shape for key, shape in matrices.items() if key not in dense}
    assert counts.linear == sum(real.get_parameter(key).numel() for key in pruned)


def test_the_group_and_the_path_to_the_same_llama_give_one_plan(tmp_path):
    sizes = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    group = ModelConfig(name="a", **sizes)
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    model = resolved(by_path(tmp_path))
    assert count_parameters(model) == count_parameters(group)
    assert prunable_shapes(model, SparsityConfig()) == prunable_shapes(group, SparsityConfig())
    assert flops_per_token(model, 1000, 64) == flops_per_token(group, 1000, 64)


def test_idle_experts_cost_no_flops(folders):
    found = describe(by_path(folders["mixtral"]))
    experts = 2 * 4 * 3 * 24 * 16
    assert found.active_share == pytest.approx((found.linear - experts / 2) / found.linear)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_as_transformers_writes_it_is_read_whole_and_written_alike(folders, name):
    model = resolved(by_path(folders[name]))
    real = AutoModelForCausalLM.from_pretrained(folders[name])
    weights = initial_weights(build_skeleton(model), str(folders[name]), by_path=True)
    tensors = full_names(real)
    for key, tensor in tensors.items():
        assert torch.equal(weights.rows(key, 0, len(tensor)), tensor), key
        assert torch.equal(weights.rows(key, 1, 2), tensor[1:2]), key
    written = {part for key, tensor in tensors.items() for part in stored_form(real, key, tensor)}
    real.save_pretrained(folders[name].parent / f"{name}-again")
    from safetensors import safe_open

    with safe_open(folders[name].parent / f"{name}-again" / "model.safetensors", "pt") as file:
        assert written == set(file.keys())


def test_names_without_the_prefix_of_the_model_are_read(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    tensors = {
        key.removeprefix("transformer."): value for key, value in load_file(folder / "model.safetensors").items()
    }
    # openai-community/gpt2 stores this in addition to the weights.
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    model = build_skeleton(resolved(by_path(folder)))
    weights = initial_weights(model, str(folder), by_path=True)
    assert torch.equal(weights.rows("transformer.wte.weight", 0, 300), tensors["wte.weight"])


def test_bf16_in_many_files_becomes_float32_with_the_same_values(tmp_path):
    folder = folder_of("mixtral", tmp_path / "mixtral", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = resolved(by_path(folder))
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    weights = initial_weights(build_skeleton(model), str(folder), by_path=True)
    for key, tensor in full_names(real).items():
        assert torch.equal(weights.rows(key, 0, len(tensor)).float(), tensor.float())


def test_a_missing_expert_is_named(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["mixtral"], tmp_path / "mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.experts.gate_up_proj is combined from .* some of them are missing"
    ):
        initial_weights(build_skeleton(resolved(by_path(folder))), str(folder), by_path=True)


def test_overrides_change_the_config_and_its_lists_of_layers(folders):
    config = hf_config(str(folders["gemma3"]), {"num_hidden_layers": 1, "rms_norm_eps": 1e-5})
    assert (config.num_hidden_layers, config.layer_types, config.rms_norm_eps) == (1, ["sliding_attention"], 1e-5)
    assert hf_config(str(folders["gpt2"]), {"num_hidden_layers": 3}).n_layer == 3
    deeper = hf_config(str(folders["gemma3"]), {"num_hidden_layers": 7})
    assert len(deeper.layer_types) == 7
    llama = hf_config(str(folders["llama3"]), {"rope_parameters": {"factor": 4.0}})
    assert (llama.rope_parameters["factor"], llama.rope_parameters["rope_theta"]) == (4.0, 5e5)


def edit(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def test_what_is_no_plain_causal_language_model_is_refused_in_a_sentence(folders, tmp_path):
    def copy(**values: object) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return str(edit(shutil.copytree(folders["phi3"], folder), **values))

    for values, words in (
        ({"model_type": "t5"}, "not a text-only causal language model"),
        ({"model_type": "gemma3"}, "not a text-only causal language model"),
        ({"model_type": "nobody_knows"}, "does not have"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.MyPhi3"}}, "which loads custom code"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ):
        with pytest.raises(ValueError, match=words):
            hf_config(copy(**values), {})
    theirs = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert hf_config(copy(auto_map=theirs), {}).model_type == "phi3"
    with pytest.raises(ValueError, match=r"model\.overrides\.num_layers .* did you mean num_hidden_layers\?"):
        hf_config(copy(), {"num_layers": 2})
    with pytest.raises(ValueError, match=r"model\.path=/nowhere/at/all does not exist"):
        hf_config("/nowhere/at/all", {})


def test_keys_of_the_llama_group_are_refused_beside_a_path(folders):
    with pytest.raises(ValueError, match=r"model\.hidden_size=64 has no effect .*model\.overrides=\{hidden_size: 64\}"):
        resolved(by_path(folders["qwen3"], hidden_size=64))
    with pytest.raises(ValueError, match=r"model\.init=authors"):
        by_path(folders["qwen3"], init="authors")
    with pytest.raises(ValueError, match=r"model\.path names none"):
        composed("train", ["model.overrides={num_hidden_layers: 4}"])


def test_a_pickle_is_refused_with_the_way_out(folders, tmp_path):
    folder = shutil.copytree(folders["qwen3"], tmp_path / "qwen3")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as a pickle \(\.bin\).*save_pretrained\(OTHER_FOLDER\)"):
        initial_weights(build_skeleton(resolved(by_path(folder))), str(folder), by_path=True)


def test_a_folder_without_a_tokenizer_needs_one(folders, tmp_path):
    folder = shutil.copytree(folders["qwen3"], tmp_path / "qwen3", ignore=shutil.ignore_patterns("tok*"))
    config = composed("train", ["model=hf", f"model.path={folder}"])
    with pytest.raises(ValueError, match="holds no tokenizer"):
        check_tokenizer_of_path(config)
    check_tokenizer_of_path(composed("train", ["model=hf", f"model.path={folder}", "tokenizer=train"]))


def test_another_config_than_the_models_is_refused_with_the_override_that_takes_it_over(folders, tmp_path):
    folder = edit(shutil.copytree(folders["qwen3"], tmp_path / "qwen3"), rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r'set "model\.overrides=\{rms_norm_eps: 0\.001\}"\.'):
        initial_weights(build_skeleton(resolved(by_path(folders["qwen3"]))), str(folder), by_path=True)


def test_a_hub_name_is_read_from_the_hubs_cache(folders, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "0" * 40
    repository = tmp_path / "models--some--tiny-qwen3"
    shutil.copytree(folders["qwen3"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("train.plan.hub.is_reachable", lambda: False)
    config = composed("train", ["model=hf", "model.path=some/tiny-qwen3", "init_from=some/tiny-qwen3"])
    plan = plan_run(config, 1)
    assert plan.model.name == "tiny-qwen3"
    assert plan.counts.linear == describe(by_path(folders["qwen3"])).linear
    initial_weights(build_skeleton(plan.model), "some/tiny-qwen3", by_path=True)
    with pytest.raises(
        ValueError, match=r"init_from=some/other is not a folder here and cannot be fetched from the hub"
    ):
        initial_weights(build_skeleton(plan.model), "some/other", by_path=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_twin_is_of_the_architecture_with_its_proportions(folders, name):
    model = resolved(by_path(folders[name], overrides={"n_embd": 64} if name == "gpt2" else {"hidden_size": 64}))
    twin = dense_twin(model, 0.5)
    assert twin.linear_params == count_parameters(twin.model).linear
    assert abs(twin.relative_error) < 0.15
    assert (twin.model.num_hidden_layers, twin.model.num_attention_heads) == (2, 2)
    assert twin.model.hidden_size < 64
    assert twin.model.name == f"{name}-{twin.model.hidden_size}"


def test_a_twin_of_an_unknown_architecture_is_refused_with_those_that_have_one(tmp_path):
    from transformers import GPTNeoXConfig

    GPTNeoXConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"not defined for model_type=gpt_neox.*gpt2.*qwen3"):
        dense_twin(resolved(by_path(tmp_path)), 0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_draws_no_more_at_once_than_the_plan_says(folders, name, monkeypatch):
    model = resolved(by_path(folders[name]))
    taken = []
    monkeypatch.setattr(
        "train.model.weights._materialise", lambda unit, recurse, scratch: taken.append(len(scratch)) or 1 / 0
    )
    built = build_skeleton(model)
    allocate(built, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        draw_weights(built, build_skeleton(model), 0)
    planned = host_memory(model, 2, "float32", "5GB").layer
    # Each parameter begins at a cache line of 64 bytes.
    assert planned <= taken[0] < planned + 64 * 20


@pytest.mark.parametrize("name", CONFIGS)
def test_half_of_the_weights_stay_zero_in_the_exported_and_the_compact_folder(folders, tmp_path, name):
    model = build_skeleton(resolved(by_path(folders[name])))
    allocate(model, torch.device("cpu"))
    load_initial_weights(model, str(folders[name]))
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1))
    callback.bind(model)
    callback.pruner.prune(0.5)
    zeros = count_zeros(model)
    assert (zeros.num_weights, zeros.num_zeros) == (callback.num_prunable, round(0.5 * callback.num_prunable))
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    world = World(0, 1, torch.device("cpu"))
    export_model(model, tokenizer, tmp_path / "plain", dtype="float32", max_shard_size="20KB", world=world)
    compact_folder(tmp_path / "plain", tmp_path / "compact")
    tokens = torch.arange(48)[None]
    for folder in ("plain", "compact"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert count_zeros(found) == zeros
        assert torch.equal(found(tokens).logits, model.eval()(tokens).logits)


def sharded(path: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return a model's random weights, drawn into FSDP2's shards, and the classes of the modules that FSDP2 wrapped."""
    from accelerate import Accelerator

    os.environ |= FSDP2
    world = join_world(60)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, template = (build_skeleton(resolved(by_path(path)), tokenizer) for _ in range(2))
    shard_and_allocate(Accelerator(), model)
    draw_weights(model, template, seed=3)
    wrapped = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    found = {name: full_tensor(tensor) for name, tensor in full_names(model).items()}
    world.leave()
    return found, wrapped


@pytest.mark.parametrize(
    ("name", "block"), [("gpt2", "GPT2Block"), ("gemma3", "Gemma3DecoderLayer"), ("qwen3_moe", "Qwen3MoeDecoderLayer")]
)
def test_two_ranks_wrap_the_models_own_blocks_and_draw_the_weights_of_one_process(folders, name, block):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    expected = full_names(build_model(resolved(by_path(folders[name])), tokenizer, seed=3))
    for found, wrapped in run_ranks(sharded, 2, str(folders[name]), joined=False):
        assert wrapped.count(f"FSDP{block}") == 2
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt2", "qwen3"])
def test_layers_that_look_back_only_so_far_keep_their_masks(folders, name):
    from train.model.attention import WHOLE_BLOCKS, attend_over_whole_blocks

    model, expected = (AutoModelForCausalLM.from_pretrained(folders[name]).eval() for _ in range(2))
    attend_over_whole_blocks(model)
    tokens = torch.arange(64)[None]
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    slides = name in ("gemma3", "mistral")
    assert (model.config._attn_implementation == WHOLE_BLOCKS) != slides
