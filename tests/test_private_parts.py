"""A list of the private parts of torch, accelerate, transformers and Hydra that we call or override.

A library may change them in any release. Each entry says what we rely on; its test names the version in which that changed.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest


@dataclass(frozen=True)
class Part:
    """A private function, its parameters, and which of our files needs it for what."""

    module: str
    name: str
    parameters: str
    user: str

    def find(self) -> Any:
        found: Any = importlib.import_module(self.module)
        for name in self.name.split("."):
            found = getattr(found, name)
        return found

    @property
    def library(self) -> str:
        name = self.module.partition(".")[0]
        return f"{name} {version({'hydra': 'hydra-core'}.get(name, name))}"


FSDP, ELASTIC = "torch.distributed.fsdp", "torch.distributed.elastic.agent.server.api"
CALLED = (
    Part(FSDP, "FSDPModule._get_fsdp_state", "self", "sparsity.wrappers: FSDP2's groups of parameters"),
    Part(f"{FSDP}._fully_shard._fsdp_param", "FSDPParam.reset_sharded_param", "self", "train.model.weights.allocate"),
    Part("torch.distributed.distributed_c10d", "_set_pg_timeout", "timeout, group", "train.distributed.set_group_timeouts"),
    Part("torch._dynamo", "list_backends", "exclude_tags", "train.arguments: is a backend known"),
    Part("torch.cuda.memory", "_dump_snapshot", "filename, *", "train.speed.profiler"),
    Part("torch.cuda.memory", "_record_memory_history", "enabled, context, stacks, max_entries, *", "train.speed.profiler"),
    Part("accelerate.utils.fsdp_utils", "fsdp2_prepare_model", "accelerator, model", "train.model.weights.shard_and_allocate"),
    Part("accelerate.utils.fsdp_utils", "fsdp2_apply_ac", "accelerator, model", "train.model.weights.shard_and_allocate"),
    Part("transformers", "PreTrainedModel._from_config", "config, *", "train.model.build"),
    Part("transformers", "PreTrainedModel._init_weights", "self, module", "train.model.parametrisation: drawing weights"),
    Part("transformers", "PreTrainedModel._get_dtype_plan", "self, dtype", "sparsity.compact.loading"),
    Part("hydra._internal.callbacks", "Callbacks", "config", "launch.remote: a context for Hydra's launchers"),
    Part(
        "hydra._internal.core_plugins.basic_sweeper", "BasicSweeper.split_arguments", "overrides, max_batch_size",
        "launch.sweep: a sweep's combinations",
    ),
)  # fmt: skip
OVERRIDDEN = (
    Part("torch.nn.modules.module", "Module._apply", "self, fn, recurse", "sparsity.compact.linear: scales in float32"),
    Part(
        ELASTIC,
        "SimpleElasticAgent._monitor_workers",
        "self, worker_group",
        "launch.agent: no idle restart",
    ),
    Part("transformers", "Trainer._clip_grad_norm", "self, model", "train.trainer: replicas clip alike"),
    Part("transformers", "Trainer._get_grad_norm", "self, model, grad_norm", "train.trainer: skipped updates"),
    Part(
        "transformers", "Trainer._get_train_sampler", "self, train_dataset", "train.trainer: resumable order of blocks"
    ),
    Part(
        "transformers",
        "Trainer.get_batch_samples",
        "self, epoch_iterator, num_batches, device",
        "train.trainer: data waits",
    ),
    Part(
        "transformers",
        "Trainer._run_epoch",
        "self, model, epoch, *",
        "train.trainer: a run resumed after its last step",
    ),
    Part("transformers", "Trainer._save_checkpoint", "self, model, trial", "train.resumable: our checkpoints"),
    Part("transformers", "Trainer._load_from_checkpoint", "self, resume_from_checkpoint, model", "train.resumable"),
    Part(
        "transformers", "Trainer._load_optimizer_and_scheduler", "self, checkpoint", "train.resumable: our checkpoints"
    ),
    Part("transformers", "Trainer._load_scaler", "self, checkpoint", "train.resumable: our checkpoints"),
    Part("transformers", "Trainer._load_rng_state", "self, checkpoint", "train.resumable: our checkpoints"),
)


def parameters_of(part: Part) -> list[str]:
    return list(inspect.signature(part.find()).parameters)


@pytest.mark.parametrize("part", [*CALLED, *OVERRIDDEN], ids=lambda part: f"{part.module}.{part.name}")
def test_a_private_part_is_there_with_the_parameters_that_we_give(part):
    try:
        found = parameters_of(part)
    except (AttributeError, ImportError):
        pytest.fail(f"{part.library} has no {part.module}.{part.name}, which {part.user} relies on")
    wanted = part.parameters.split(", ")
    if wanted[-1] == "*":
        found, wanted = found[: len(wanted) - 1], wanted[:-1]
    assert found == wanted, f"{part.library} changed {part.module}.{part.name}, which {part.user} relies on"


@pytest.mark.parametrize("part", OVERRIDDEN, ids=lambda part: part.name)
def test_a_method_that_we_override_is_still_called(part):
    source = inspect.getsource(inspect.getmodule(part.find()))
    called = f"self.{part.name.rpartition('.')[2]}"
    assert called in source, f"{part.library} no longer calls {part.name}, which {part.user} overrides"


def test_groups_carry_a_timeout_and_a_model_names_its_blocks():
    import torch.distributed as dist
    from transformers import LlamaForCausalLM

    assert hasattr(dist.distributed_c10d._world, "pg_map"), (
        "train.distributed and train.faults.heartbeat list the groups"
    )
    assert hasattr(dist.ProcessGroup, "_get_backend"), "train.faults.heartbeat asks NCCL for its error"
    assert "LlamaDecoderLayer" in LlamaForCausalLM._no_split_modules, "train.model.weights and eval.model.shards"


def test_a_change_is_reported_with_the_librarys_version():
    gone = Part("transformers", "Trainer._gone", "self", "train.trainer")
    with pytest.raises(pytest.fail.Exception, match=r"transformers \d+\.\d+.* has no transformers.Trainer._gone"):
        test_a_private_part_is_there_with_the_parameters_that_we_give(gone)
    other = Part("transformers", "Trainer._load_scaler", "self, folder", "train.trainer")
    with pytest.raises(AssertionError, match=r"transformers \d+\.\d+.* changed transformers.Trainer._load_scaler"):
        test_a_private_part_is_there_with_the_parameters_that_we_give(other)
