"""Norms of the inputs of linear layers over calibration text, for scores that ask for them.

The norms are the same to the last bit for any number of ranks, if a sequence's activations are. Each sequence passes through
the model alone, so that no shape depends on the number of ranks. A sequence's sums of squares are split into a whole and a
fraction and rounded to integers, whose sums over sequences and ranks do not depend on their order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from sparsity.layers import linear_layers

FRACTION_BITS = 40
"""A sequence's sum of squares is rounded to a multiple of 2^-40; 2^22 sequences fit in int64."""
LARGEST = 2.0**52
"""Sums of squares from here on are refused, as are infinite ones and NaN."""


@dataclass(frozen=True)
class Calibration:
    """Text to collect activations from: `fetch(i)` returns the model's arguments for sequence i of `num_sequences`."""

    num_sequences: int
    fetch: Callable[[int], Any]


def calibration_of(loader: Any, num_sequences: int) -> Calibration:
    """Return sequences of a training loader's data, spread evenly over it; the loader itself is not touched.

    Args:
        loader: A DataLoader, also one that accelerate prepared.
        num_sequences: How many sequences; all of them if the data has fewer.

    Raises:
        ValueError: The data has no items by number.
    """
    data: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    # An IterableDataset may have a length, and inherits a __getitem__ that only raises.
    is_stream = isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__")
    if is_stream or collate is None:
        raise ValueError(
            "A score that needs activations reads some of the training data by number, and this Trainer's data is a stream: "
            "give it a dataset with a length, or take score=magnitude."
        )
    length = len(data)
    num_sequences = min(num_sequences, length)
    return Calibration(num_sequences, lambda index: collate([data[(2 * index + 1) * length // (2 * num_sequences)]]))


@torch.no_grad()
def input_norms(
    model: nn.Module, parameters: Mapping[str, Tensor], calibration: Calibration, device: torch.device
) -> dict[str, Tensor]:
    """Return the L2 norm of each input of each parameter's layer over all calibration tokens, float32 [inputs].

    The model is evaluated without dropout. Neither its weights nor a random generator change.

    Collective: over all ranks, each of which takes a share of the sequences.

    Args:
        model: The prepared model.
        parameters: Weights of linear layers by name.
        calibration: The text.
        device: Where the model computes.

    Raises:
        ValueError: A layer saw no input, or an infinite one.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    sums = {name: _Sums(parameters[name].shape[-1], device) for name in parameters}
    with _evaluating(model), _watching(model, sums), _own_random_numbers(device):
        for first in range(0, calibration.num_sequences, world):
            # Under FSDP2 all ranks must compute, so those without a sequence repeat the last one and count nothing.
            index, last = first + rank, calibration.num_sequences - 1
            for one in sums.values():
                one.is_counting = index <= last
            _call(model, _moved(calibration.fetch(min(index, last)), device))
    numbers = [one.numbers() for one in sums.values()]
    found = torch.cat(numbers)
    if world > 1:
        dist.all_reduce(found)
    parts = found.split([len(own) for own in numbers])
    # One copy to the host for all layers.
    for name, (num_tokens, num_bad) in zip(sums, torch.stack([part[:2] for part in parts]).tolist(), strict=True):
        if not num_tokens or num_bad:
            saw = "an input that is not finite" if num_bad else "no input"
            why = "" if num_bad else ", because no token reaches its layer or nothing calls it"
            raise ValueError(
                f"{name} saw {saw} on the calibration text{why}: name it in requires_dense, or take score=magnitude."
            )
    return {name: _norms(part[2:].view(2, -1)) for name, part in zip(sums, parts, strict=True)}


def _norms(squares: Tensor) -> Tensor:
    """Return the roots of sums of squares given as wholes and fractions, int64 [2, inputs]."""
    wholes, fractions = squares.double()
    return (wholes + fractions * 2.0**-FRACTION_BITS).sqrt().float()


class _Sums:
    """Sums of squares of a layer's inputs as integers."""

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.num_inputs = num_inputs
        self.is_counting = True
        self._squares = torch.zeros(2, num_inputs, dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        """Tokens, and sums that are refused."""

    def add(self, inputs: Tensor) -> None:
        if not self.is_counting:
            return
        rows = inputs.detach().reshape(-1, self.num_inputs).float()
        sums = rows.square().sum(dim=0, dtype=torch.float64)
        is_bad = ~(sums < LARGEST)
        sums = sums.masked_fill(is_bad, 0)
        wholes = sums.floor()
        self._squares[0] += wholes.long()
        self._squares[1] += ((sums - wholes) * 2.0**FRACTION_BITS).round().long()
        self._counts[0] += len(rows)
        self._counts[1] += is_bad.sum()

    def numbers(self) -> Tensor:
        """Return tokens, bad sums, wholes and fractions, int64 [2 + 2 inputs]."""
        return torch.cat([self._counts, self._squares.view(-1)])


@contextmanager
def _watching(model: nn.Module, sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Add each call's inputs of the layers in `sums`."""
    layers = linear_layers(model)

    def see(own: _Sums, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        own.add(args[0] if args else kwargs["input"])

    hooks = [layers[name].register_forward_pre_hook(partial(see, own), with_kwargs=True) for name, own in sums.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout and without compiled code, which calls no new hooks; leave FSDP2 with its shards."""
    training = {module: module.training for module in model.modules()}
    _reshard(model)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, was in training.items():
            module.training = was
        # FSDP2 keeps the root's gathered weights after a forward pass without gradients, and the event changes the shards.
        _reshard(model)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the random generators as they were, because a collator or a dataset may draw from them, as for masked words."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one that others draw from
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, list | tuple):
        model(*batch)
    else:
        model(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, list | tuple) else batch
