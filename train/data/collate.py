"""Collating blocks of documents into a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEAST_ENDS = 32


def collate_documents(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows of `DocumentBlocks`, and add the positions at which documents begin and end.

    They are counted over all rows in sequence. transformers calls this `cu_seq_lens_q`, int32 [power of two + 1]: 0, the
    end of each document, and then the number of all tokens, repeated. It is computed here, on the host, so that attention
    on a GPU need not wait for it. Its length takes few values, so a compiled block is seldom compiled again.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"cu_seq_lens_q": document_ends(batch["position_ids"])}


def document_ends(position_ids: Tensor) -> Tensor:
    """Return int32 [1 + power of two]: the indices of position 0 in the flattened rows, then the number of all tokens."""
    starts = np.flatnonzero(position_ids.numpy() == 0)
    room = max(LEAST_ENDS, 1 << (len(starts) - 1).bit_length())
    ends = torch.full((1 + room,), position_ids.numel(), dtype=torch.int32)
    ends[: len(starts)] = torch.from_numpy(starts)
    return ends
