"""Tokens on disk as one long array, and as fixed-length blocks for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from train.data.index import read_index
from train.data.pack import STARTS_DTYPE

if TYPE_CHECKING:
    from train.data.pack import Split
    from train.data.prepared import PreparedData


NOT_PREDICTED = -100
"""The label of a token for which torch and transformers compute no loss."""


class TokenStream:
    """The tokens of a split, part after part, read from the files on demand.

    `stream[a:b]` is an array of the ids a..b-1, even across files; it may be a read-only view of a file. Files are
    opened in the process that reads them, so a stream can be sent to the workers of a dataloader.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        index = read_index(folder)
        records = [part[split] for part in index["parts"] if part[split]["num_tokens"]]
        self.dtype = np.dtype(index["dtype"])
        self.paths = [str(Path(folder, record["file"])) for record in records]
        self.offsets = [record.get("offset", 0) for record in records]
        self.dtypes = [np.dtype(record.get("dtype", index["dtype"])) for record in records]
        self.start_paths = [
            str(Path(folder, record["starts"])) if record["num_documents"] else "" for record in records
        ]
        self.starts = np.cumsum([0] + [record["num_tokens"] for record in records])
        self._maps: dict[str, np.memmap[Any, Any]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray[Any, Any]:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise IndexError(f"a TokenStream has no step {step}: slice it with [start:stop].")
        pieces = []
        part = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset, end = int(self.starts[part]), min(stop, int(self.starts[part + 1]))
            pieces.append(self._ids(part, start - offset, end - offset))
            start, part = end, part + 1
        if not pieces:
            return np.empty(0, self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate([piece.astype(self.dtype) for piece in pieces])

    def document_starts(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return the positions in start..stop-1 at which documents begin, in order."""
        pieces = []
        part = int(np.searchsorted(self.starts, start, side="right")) - 1
        while part < len(self.paths) and self.starts[part] < stop:
            offset = int(self.starts[part])
            if path := self.start_paths[part]:
                begins = self._map(path).view(STARTS_DTYPE)
                first, last = np.searchsorted(begins, [max(0, start - offset), stop - offset])
                pieces.append(begins[first:last].astype(np.int64) + offset)
            part += 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _ids(self, part: int, start: int, stop: int) -> np.ndarray[Any, Any]:
        dtype, offset = self.dtypes[part], self.offsets[part]
        span = slice(offset + start * dtype.itemsize, offset + stop * dtype.itemsize)
        return self._map(self.paths[part])[span].view(dtype)

    def _map(self, path: str) -> np.memmap[Any, Any]:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, mode="r")
        return self._maps[path]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Consecutive blocks of L tokens: item i holds tokens i x L to (i + 1) x L - 1 as `input_ids` and `labels`, int64 [L].

    The remainder at the end is left out. Documents continue across blocks. `labels` are not shifted, because
    transformers' models shift them.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream = stream
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return len(self.stream) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is outside 0..{len(self) - 1}")
        start = index * self.sequence_length
        ids = torch.from_numpy(self.stream[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class DocumentBlocks(Blocks):
    """The same blocks for attention within documents, with `position_ids` that count from 0 in each document.

    A document that crosses the end of a block continues in the next one as a new document, from position 0. The label
    of a document's first token is -100, because it must not be predicted from the document before. So is the block's
    first label, because nothing in the block predicts it.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = super().__getitem__(index)
        first = index * self.sequence_length
        starts = self.stream.document_starts(first, first + self.sequence_length) - first
        labels = block["labels"].clone()
        labels[starts] = NOT_PREDICTED
        labels[0] = NOT_PREDICTED
        return block | {"labels": labels, "position_ids": positions_within(starts, self.sequence_length)}


def positions_within(starts: np.ndarray[Any, Any], length: int) -> torch.Tensor:
    """Return the position of each of `length` tokens in its document [length]; documents begin at 0 and at `starts`."""
    places = torch.arange(length)
    begins = torch.zeros(length, dtype=torch.int64)
    begins[starts] = places[starts]
    return places - begins.cummax(0).values


def training_blocks(prepared: PreparedData) -> Blocks:
    """Return the training split in blocks of the prepared length; for a mixture, one source after another."""
    return blocks_of(prepared, prepared.folder)


def blocks_of(prepared: PreparedData, folder: str) -> Blocks:
    """Return the training split of one folder of tokens, in blocks of the length of `prepared`."""
    kind = DocumentBlocks if prepared.by_document else Blocks
    return kind(TokenStream(folder, "train"), prepared.sequence_length)


def heldout_starts(prepared: PreparedData) -> np.ndarray[Any, Any] | None:
    """Return the positions in `heldout_tokens` at which documents begin; None if the run does not separate documents."""
    if not prepared.by_document:
        return None
    stream = TokenStream(prepared.folder, "heldout")
    return 1 + stream.document_starts(0, len(stream))


def heldout_tokens(prepared: PreparedData) -> np.ndarray[Any, Any]:
    """Return a separator followed by the ids of the held-out split, int64: so every held-out token has a context.

    The length is 1 + `prepared.heldout.num_tokens`. The text of tokens [1:] has `prepared.heldout.num_bytes` bytes.
    """
    tokens = TokenStream(prepared.folder, "heldout")[:]
    return np.concatenate([np.array([prepared.separator]), tokens]).astype(np.int64)
