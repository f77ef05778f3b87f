"""The processes of a run: joining, FSDP2 through accelerate on GPUs and CPUs, checks, and leaving in order.

Everything that depends on how accelerate sets up FSDP2 without a GPU is in this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate import __version__ as accelerate_version
from accelerate.utils import DistributedType

from conf.cli import USER_ERRORS, fail

Result = TypeVar("Result")
PREPARATION_LIMIT = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """This process and its peers. `control` is a gloo group for small objects, with a timeout of days."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    """The group of all other collectives; None is the default group."""

    @property
    def is_main(self) -> bool:
        """True if this is rank 0, which alone prints and writes records."""
        return self.rank == 0

    def on_main(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call `function(*args)` on rank 0 and return its result on every rank.

        A user error on rank 0 ends all ranks.

        Collective: every rank calls it.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function(*args)
            except USER_ERRORS as error:
                answer[1] = error
        if self.control is not None:
            # The objects come from processes of the same run, so unpickling is safe.
            dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            self.leave()
            fail(answer[1], quiet=not self.is_main)
        return answer[0]

    def gather(self, value: Result) -> list[Result]:
        """Return each rank's `value`, in rank order, on all ranks.

        It raises an error if a peer has died.

        Collective: every rank calls it.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        # The objects come from processes of the same run, so unpickling is safe.
        dist.all_gather_object(values, value, group=self.group)
        return values

    def to_main(self, value: Result) -> list[Result]:
        """Return each rank's `value`, in rank order, on rank 0, and an empty list on the others.

        Collective: every rank calls it.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        # The objects come from processes of the same run, so unpickling is safe.
        dist.gather_object(value, values, group=self.group)
        return values or []

    def problems(self, problem: str | None) -> list[str]:
        """Return the problems of all ranks on all ranks; if there are none, only a flag is exchanged.

        Collective: every rank calls it.
        """
        flag = torch.tensor(int(problem is not None), device=self.device)
        return [found for found in self.gather(problem) if found] if int(self.largest(flag)) else []

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average `values` over the ranks, in place, and return them.

        Collective: every rank calls it.
        """
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Replace each of `values` by its maximum over the ranks, in place, and return them.

        Collective: every rank calls it.
        """
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over the ranks, in place, and return them.

        Collective: every rank calls it.
        """
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def leave(self) -> None:
        """Leave the process group in order, with a barrier: without it a rank sometimes aborts at exit.

        Collective: every rank calls it.
        """
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def join_world(timeout_s: int) -> World:
    """Join the process group for which accelerate launched this process.

    Collective: every rank calls it.

    Args:
        timeout_s: Seconds that a collective waits for a rank.

    Raises:
        ValueError: The world has another size than the launcher asked for; accelerate itself would then start
            independent runs that do not know of each other.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if wants_fsdp() and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate was asked for FSDP but started a single process without a process group, as --cpu does: use a "
            "config of launch/accelerate, or `python -m launch`."
        )
    on_cpu = not torch.cuda.is_available()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _join_again("gloo" if on_cpu else "nccl", timedelta(seconds=timeout_s))
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_s))
    if on_cpu and wants_fsdp() and state.distributed_type == DistributedType.MULTI_CPU:
        # accelerate allows FSDP only in a world of GPUs, although FSDP2 itself also runs on gloo.
        state.distributed_type = DistributedType.MULTI_GPU
    if state.num_processes != asked:
        raise ValueError(
            f"accelerate was asked for {asked} processes but set up a world of {state.num_processes}, so {asked} "
            "independent runs would start: use a config of launch/accelerate, or `python -m launch`."
        )
    control = dist.new_group(backend="gloo", timeout=PREPARATION_LIMIT) if dist.is_initialized() else None
    return World(state.process_index, state.num_processes, state.device, control)


def _join_again(backend: str, timeout: timedelta) -> None:
    """Join after a restart, under new keys: the agent's store still holds the addresses of the ranks that died."""
    environment = os.environ
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=timeout)
    fresh = dist.PrefixStore(f"restart-{environment['TORCHELASTIC_RESTART_COUNT']}", store)
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if backend == "nccl":
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout)


def wants_fsdp() -> bool:
    """Return whether accelerate was asked for FSDP, by the variable that it sets for its processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Make FSDP2 sum gradients over the ranks in float32 and leave the loss in float32.

    accelerate would round both to the compute dtype. A bfloat16 sum over many ranks loses small gradients, though a
    float32 sum moves twice the bytes. A bfloat16 loss near 2 has steps of 0.016. Outputs keep the dtype that the model
    gives them (`output_dtype=None`): float32 for the loss, and no float32 copy of the logits.

    Args:
        accelerator: The accelerator, before it prepares the model.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def check_ranks_gather_alike(world: World, accelerator: Accelerator) -> None:
    """Check that all ranks agree on whether to free gathered weights; a mixed group would wait forever.

    Collective: every rank calls it.

    Raises:
        ValueError: On every rank, if machines with different GPUs made different choices.
    """
    if accelerator.is_fsdp2 and len(set(world.gather(bool(accelerator.state.fsdp_plugin.reshard_after_forward)))) > 1:
        raise ValueError(
            "launch.reshard_after_forward=auto gave true on one machine and false on another, whose GPUs have more "
            "memory: set it to true or to false."
        )


def set_group_timeouts(world: World, timeout_s: int) -> None:
    """Give every process group the run's timeout; the groups of a device mesh, as in HSDP, have only the default one.

    Args:
        world: This process, whose `control` group keeps its longer timeout.
        timeout_s: Seconds that a collective waits for a rank.
    """
    for group in list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []:
        if group is not world.control:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def check_fsdp2(accelerator: Accelerator) -> None:
    """Check that FSDP2 is in use if it was asked for.

    Raises:
        ValueError: It is not.
    """
    if wants_fsdp() and not accelerator.is_fsdp2:
        raise ValueError(
            f"FSDP2 was asked for, but accelerate {accelerate_version} set up {accelerator.distributed_type.value}: on "
            "GPUs set fsdp_version: 2; on CPUs this accelerate no longer allows it, install accelerate 1.15."
        )
