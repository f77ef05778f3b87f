"""Held-out figures of a model: nats over windows, and from them perplexity and bits per byte."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from train.distributed import World


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a token stream, in nats.

    The stream is cut into disjoint windows. `window_nats` leaves out each window's first token, which has no context,
    and the remainder that fills no window; `nats` scores every token but the very first of the stream.
    """

    window: int
    num_windows: int
    num_window_tokens: int
    window_nats: float
    num_tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Token-level perplexity over the disjoint windows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def loss(self) -> float:
        """Nats per token over the disjoint windows."""
        return self.window_nats / self.num_window_tokens

    def bits_per_byte(self, num_bytes: int) -> float:
        return self.nats / math.log(2) / num_bytes


def score_stream(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    window: int,
    batch_size: int,
    world: World,
    show_progress: bool = False,
) -> Score:
    """Score `tokens` [n], which begin with a separator, in windows shared out over the ranks. Collective.

    Every rank runs the same number of forward passes of the same shape, as FSDP needs; one without a window left runs
    on padding.
    """
    starts = range(0, len(tokens) - 1, window)
    num_windows = len(tokens) // window
    per_round = world.size * batch_size
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    rounds = range(0, len(starts), per_round)
    for first in tqdm(
        rounds,
        desc="held-out",
        unit="batch",
        disable=not (show_progress and world.is_main),
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    ):
        mine = starts[first : first + per_round][world.rank :: world.size]
        totals += _score_windows(model, tokens, mine, (batch_size, window), world.device)
    model.train(was_training)
    _reshard(model)
    window_nats, nats = world.sum(totals).tolist()
    return Score(
        window=window,
        num_windows=num_windows,
        num_window_tokens=num_windows * (window - 1),
        window_nats=window_nats,
        num_tokens=len(tokens) - 1,
        nats=nats,
    )


@torch.no_grad()
def _score_windows(
    model: nn.Module, tokens: np.ndarray, starts: range, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """[nats of the full windows without the token that follows each, nats of all tokens]."""
    window = shape[1]
    inputs = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    is_full = torch.zeros(len(inputs), dtype=torch.bool)
    for row, start in enumerate(starts):
        piece = torch.from_numpy(np.asarray(tokens[start : start + window + 1], dtype=np.int64))
        inputs[row, : min(window, len(piece))] = piece[:window]
        targets[row, : len(piece) - 1] = piece[1:]
        is_full[row] = len(piece) >= window
    logits = model(input_ids=inputs.to(device), use_cache=False).logits
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.to(device).flatten(), ignore_index=-100, reduction="none"
    ).view(targets.shape)
    inside = losses[:, :-1].double().sum(dim=1)
    return torch.stack([(inside * is_full.to(device)).sum(), losses.double().sum()])


def _reshard(model: nn.Module) -> None:
    """A forward pass without gradient leaves FSDP2's last group gathered; give the memory back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
