"""Running a plain function on several gloo ranks, with a timeout, and collecting the results."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


def run_ranks(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    joined: bool = True,
    on_gpu: bool = False,
) -> list[Any]:
    """Return the results of `body(*args)` in rank order, run on `world_size` ranks of one thread each.

    `body` must be importable. With `joined=False` it starts like a script under torchrun: with the environment variables,
    but without a process group. With `on_gpu=True` all ranks see the GPUs, and gloo serves CPU and CUDA tensors.
    """
    # Ranks are forked from a server that has imported torch, because the import takes longer than most functions.
    # On a GPU they are spawned, because a forked process cannot use the driver's state that it inherits.
    context = mp.get_context("spawn" if on_gpu else "forkserver")
    if not on_gpu:
        context.set_forkserver_preload(["train.trainer", "train.model.export"])
    results: Any = context.Queue()
    # The store is in this process, as in torchrun's agent: its port is reserved from the start, and it outlives the ranks.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(
            target=_rank_main, args=(body, rank, world_size, store.port, args, results, joined, on_gpu), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(found) < world_size:
            try:
                rank, value, error = results.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{world_size - len(found)} ranks did not finish within {timeout_s} s") from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            found[rank] = pickle.loads(value)
    finally:
        for process in ranks:
            process.join(timeout=5 if len(found) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world_size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    args: tuple[Any, ...],
    results: Any,
    joined: bool,
    on_gpu: bool,
) -> None:
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if joined or world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    torch.set_num_threads(1)
    if on_gpu and torch.cuda.is_available():
        # The device is set here, before a device mesh would choose the one with the rank's number.
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.cuda.init()
    try:
        if joined:
            backend = "cpu:gloo,cuda:gloo" if on_gpu and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=60))
        value = body(*args)
        if dist.is_initialized():
            dist.barrier()
        # Results are sent as bytes: torch would share tensors through files that are removed when the process ends.
        results.put((rank, pickle.dumps(value), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def shard_by_layers(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Shard a model over all ranks with FSDP2, each of its layers as a unit of its own."""
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


@contextmanager
def mesh_of_one(device: torch.device) -> Iterator[DeviceMesh]:
    """Make a mesh of this process alone."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()
