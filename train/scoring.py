"""The held-out score of a model: the loss in nats of each token of a text, and the perplexity and bits per byte."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from train.data.collate import document_ends
from train.data.stream import heldout_starts, positions_within
from train.distributed import World

if TYPE_CHECKING:
    from train.data import PreparedData

ROWS_AT_A_TIME = 64
"""The number of positions whose logits are converted to float32 together: 8 MB for a vocabulary of 32,000."""


@dataclass(frozen=True)
class Window:
    """One forward pass: the model reads tokens start .. stop - 2, and tokens first .. stop - 1 are scored."""

    start: int
    stop: int
    first: int

    @property
    def num_inputs(self) -> int:
        """The number of tokens that the model reads."""
        return self.stop - self.start - 1

    @property
    def scored(self) -> slice:
        """The input positions whose predictions are scored."""
        return slice(self.first - self.start - 1, self.num_inputs)


@dataclass(frozen=True)
class Documents:
    """The starts of the documents of a text, for a model that reads each document without those before it."""

    starts: NDArray[np.integer]
    """The positions of the starts in the text, in order."""
    bos: int | None
    """The token with which every document begins, or None."""

    def within(self, window: Window) -> NDArray[np.integer]:
        """Return the starts in the window, counted from its beginning."""
        first, last = np.searchsorted(self.starts, [window.start, window.stop])
        return self.starts[first:last] - window.start


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of a token stream, in nats.

    The stream is cut into disjoint windows. `window_nats` leaves out each window's first token, which has no context, and
    the last tokens if they do not fill a window. `nats` scores every token except the first of the stream.

    If documents are read one by one, `window_nats` also leaves out each document's first token. In `nats` such a token
    is not counted if it is always bos; otherwise it costs as much as a uniform guess from the vocabulary.
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
        return perplexity(self.window_nats, self.num_window_tokens)

    @property
    def loss(self) -> float:
        """Nats per token over the disjoint windows."""
        return self.window_nats / self.num_window_tokens

    def bits_per_byte(self, num_bytes: int) -> float:
        """Return all tokens' information in bits over the bytes of their text."""
        return self.nats / math.log(2) / num_bytes


def heldout_documents(prepared: PreparedData) -> Documents | None:
    """Return the starts of the documents in `heldout_tokens`; None if the run does not separate documents."""
    starts = heldout_starts(prepared)
    return None if starts is None else Documents(starts, prepared.bos)


def perplexity(nats: float, count: int) -> float:
    """Return exp(nats / count), the perplexity per token or word; infinity if it is too large for a float."""
    return math.exp(nats / count) if nats / count < 700 else math.inf


def disjoint_windows(num_tokens: int, window: int) -> list[Window]:
    """Return consecutive windows of `window` inputs, which together score every token except the first."""
    starts = range(0, num_tokens - 1, window)
    return [Window(start, min(start + window + 1, num_tokens), start + 1) for start in starts]


def score_stream(
    model: nn.Module,
    tokens: NDArray[np.integer],
    *,
    window: int,
    batch_size: int,
    world: World,
    documents: Documents | None = None,
    show_progress: bool = False,
) -> Score:
    """Score `tokens` [n], which begin with a separator, in disjoint windows divided among the ranks.

    Collective: every rank of `world` calls it.

    Args:
        model: A causal language model; with `documents`, one that `train.model.attention.attend_within_documents`
            prepared.
        tokens: The text.
        window: The number of tokens that the model reads at a time.
        batch_size: The number of windows that each rank scores at a time.
        world: The ranks.
        documents: The starts of documents, to read each document by itself; None to read across them.
        show_progress: Whether to show a bar on rank 0.

    Returns:
        The score, on every rank.
    """
    nats = token_nats(
        model,
        tokens,
        disjoint_windows(len(tokens), window),
        width=window,
        batch_size=batch_size,
        world=world,
        documents=documents,
        progress="held-out" if show_progress else None,
    )
    num_windows = len(tokens) // window
    predicted = np.ones(len(tokens), dtype=bool)
    certain = 0
    if documents is not None:
        predicted[documents.starts] = False
        certain = len(documents.starts) if documents.bos is not None else 0
    shape = (num_windows, window)
    inside = nats[: num_windows * window].reshape(shape)[:, 1:]
    counted = predicted[: num_windows * window].reshape(shape)[:, 1:]
    return Score(
        window=window,
        num_windows=num_windows,
        num_window_tokens=int(counted.sum()),
        window_nats=float(inside.sum() if documents is None else inside[counted].sum()),
        num_tokens=len(tokens) - 1 - certain,
        nats=float(nats.sum()),
    )


def token_nats(
    model: nn.Module,
    tokens: NDArray[np.integer],
    windows: Sequence[Window],
    *,
    width: int,
    batch_size: int,
    world: World,
    documents: Documents | None = None,
    progress: str | None = None,
) -> NDArray[np.float64]:
    """Return the nats of each token [n] in the window that scores it, on every rank; 0 if no window does.

    The ranks divide the windows among them. Every rank runs the same number of forward passes, as FSDP needs; a rank that
    has no window left runs on padding.

    Collective: every rank of `world` calls it.

    Args:
        model: A causal language model.
        tokens: The text.
        windows: The windows.
        width: The largest number of inputs in a window.
        batch_size: The number of windows that each rank scores at a time.
        world: The ranks.
        documents: The starts of documents, to read each document by itself; None to read across them.
        progress: The label of a bar; None for no bar.
    """
    nats = np.zeros(len(tokens))
    per_round = world.size * batch_size
    was_training = model.training
    model.eval()
    rounds = tqdm(
        range(0, len(windows), per_round),
        desc=progress,
        unit="batch",
        disable=progress is None or not world.is_main,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )
    for begin in rounds:
        mine = windows[begin : begin + per_round][world.rank :: world.size]
        losses = _losses(model, tokens, mine, (batch_size, width), world.device, documents)
        for window, row in zip(mine, losses, strict=False):
            nats[window.first : window.stop] = row[window.scored]
    model.train(was_training)
    reshard(model)
    return world.sum(torch.from_numpy(nats).to(world.device)).cpu().numpy()


@torch.no_grad()
def _losses(
    model: nn.Module,
    tokens: NDArray[np.integer],
    windows: Sequence[Window],
    shape: tuple[int, int],
    device: torch.device,
    documents: Documents | None,
) -> NDArray[np.float32]:
    """Return the nats of the token after each input position [batch_size, width]; 0 if it is not scored."""
    inputs = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    for row, window in enumerate(windows):
        # A causal model's outputs do not depend on the padding after its inputs.
        inputs[row, : window.num_inputs] = torch.from_numpy(tokens[window.start : window.stop - 1].astype(np.int64))
        targets[row, window.scored] = torch.from_numpy(tokens[window.first : window.stop].astype(np.int64))
    unscored = min((window.scored.start for window in windows), default=0)
    options: dict[str, Any] = {}
    starts = [] if documents is None else [documents.within(window) for window in windows]
    if documents is not None:
        positions = torch.arange(shape[1]).repeat(shape[0], 1)
        for row, places in enumerate(starts):
            positions[row] = positions_within(places[places < shape[1]], shape[1])
        options["position_ids"] = positions.to(device)
        options["cu_seq_lens_q"] = document_ends(positions).to(device)
    if unscored and _can_leave_out_logits(model):
        options["logits_to_keep"] = shape[1] - unscored
    logits = model(input_ids=inputs.to(device), use_cache=False, **options).logits
    targets = targets[:, -logits.shape[1] :]
    losses = torch.zeros(shape)
    losses[:, -logits.shape[1] :] = (
        _cross_entropy(logits.flatten(0, 1), targets.to(device).flatten()).cpu().view_as(targets)
    )
    for row, places in enumerate(starts):
        # The logits before a document's first token come from the previous document, so they are no prediction of it.
        guess = 0.0 if documents is None or documents.bos is not None else math.log(logits.shape[-1])
        losses[row, places[places > 0] - 1] = guess
    return losses.numpy()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats of targets [n] under logits [n, vocabulary], a few rows at a time: a float32 copy would be large."""
    pieces = zip(logits.split(ROWS_AT_A_TIME), targets.split(ROWS_AT_A_TIME), strict=True)
    return torch.cat([F.cross_entropy(some.float(), ids, ignore_index=-100, reduction="none") for some, ids in pieces])


def _can_leave_out_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2's last group keeps gathered after a forward pass without gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
