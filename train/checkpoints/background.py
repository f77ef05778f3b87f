"""Checkpoints that a thread writes while training continues: copied to the host first, visible only when complete."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoints.write import Checkpoint, begin_checkpoint, finish_checkpoint
from train.distributed import World


class BackgroundWriter:
    """A writer of checkpoints that works in a thread, one checkpoint at a time.

    The training thread copies this rank's tensors to host memory, pinned if they are on a GPU, and creates the folder.
    Then the writing thread takes over. The ranks' writing threads have their own gloo group, because neither NCCL's
    collectives nor those of the training thread's groups may be called from two threads. The host memory, as large as
    this rank's file, is reused for the next checkpoint.

    Collective: every rank creates one.

    Args:
        world: This process and its peers.
        timeout_s: Seconds that a rank's thread waits for those of the other ranks.
    """

    def __init__(self, world: World, timeout_s: int) -> None:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world.size > 1 else None
        self._world = replace(world, device=torch.device("cpu"), group=group)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def has_failed(self) -> bool:
        """Return whether the last checkpoint failed on this rank and `wait` has not raised its error yet."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            RunStopped: On every rank, if one of them could not write.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint as `train.checkpoints.write` does, but return as soon as everything is copied.

        If an earlier checkpoint is still being written, wait for it first.

        Collective: every rank calls it.

        Raises:
            RunStopped: On every rank, if one of them could not write the previous checkpoint or could not begin this one.
        """
        self.wait()
        self._buffers = host_copies(checkpoint.tensors, self._buffers)
        state = json.loads(json.dumps(checkpoint.state))
        needed = begin_checkpoint(replace(checkpoint, tensors=self._buffers))
        copied = replace(checkpoint, tensors=self._buffers, state=state, world=self._world)

        def finish() -> None:
            try:
                finish_checkpoint(copied, needed)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=finish, daemon=True, name=f"checkpoint-{checkpoint.step}")
        self._thread.start()


def host_copies(tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy `tensors` to the host, from a GPU to pinned memory; they may change as soon as this returns.

    Args:
        tensors: Tensors on any device.
        buffers: Copies from an earlier call; those with the same shape and dtype are overwritten.
    """
    copies = {}
    for name, tensor in tensors.items():
        old = buffers.get(name)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = old.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies
