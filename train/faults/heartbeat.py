"""The detection of lost ranks: each rank posts its step, and after a failed collective the survivors report the others."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LOST_CODE = 1
GRACE_S = 4.0
"""Seconds for which survivors wait for one another before they report the others as silent."""
NCCL_POLL_S = 1.0


class Heartbeat:
    """This rank's signs of life in the process group's store; the launcher's agent holds it, so it outlives the ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.step = -1
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None

    def beat(self, step: int) -> None:
        """Post that this rank begins `step`."""
        if self._store is not None and step != self.step:
            self._store.set(f"step/{self.rank}", str(step))
        self.step = step

    def watch_nccl(self) -> None:
        """Start a thread that reports NCCL's failures, which raise no exception.

        NCCL's collectives do not block: a rank that waits for a lost one waits on its GPU. torch's watchdog notices
        after the timeout, marks the process group, and a minute later aborts the process (torch 2.11 to 2.13: four
        times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC). This thread reports within that minute; if it fails, the abort still
        comes.
        """
        if torch.cuda.is_available() and dist.is_initialized():
            threading.Thread(target=self._watch_nccl, daemon=True, name="nccl errors").start()

    def _watch_nccl(self) -> None:
        while (error := nccl_error(list(dist.distributed_c10d._world.pg_map))) is None:
            time.sleep(NCCL_POLL_S)
        self.report_and_exit(RuntimeError(error))

    def post_error(self) -> None:
        """Post that this rank ends with its own error, which its launcher shows."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"error/{self.rank}", socket.gethostname())

    def report_and_exit(self, error: BaseException) -> None:
        """Report the silent ranks after a failed collective and end this process; only the first survivor reports.

        Nothing is reported if the silent ranks have their own error and this machine's launcher shows it.
        """
        silent, explained = self._ask_in_time()
        survivors = [rank for rank in range(self.size) if rank not in (silent or {})]
        is_explained_here = bool(silent) and set(explained.values()) == {socket.gethostname()}
        if (silent is None or self.rank == survivors[0]) and not is_explained_here:
            said = " ".join(str(error).split())[:200]
            # A progress bar may occupy the current line.
            print(f"\nerror: {loss_sentence(silent, self.step)} ({said})", file=sys.stderr, flush=True)
        # The group is broken: an orderly exit would wait for the lost rank.
        os._exit(LOST_CODE)

    def _ask_in_time(self) -> tuple[dict[int, int] | None, dict[int, str]]:
        """Return the silent ranks, and their machines that posted errors; (None, {}) if the store does not answer.

        A thread asks, so that this one can stop waiting: a connection to a machine with a broken cable fails only when
        TCP gives up.
        """
        answers: list[tuple[dict[int, int], dict[int, str]]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                lost = self._silent_ranks()
                answers.append((lost, self._hosts_with_errors(lost)))

        asking = threading.Thread(target=ask, daemon=True, name="survivors")
        asking.start()
        asking.join(3 * GRACE_S)
        return answers[0] if answers else (None, {})

    def _silent_ranks(self) -> dict[int, int]:
        """Return the ranks that do not report the failure themselves, with the last step that each began."""
        assert self._store is not None
        self._store.set_timeout(timedelta(seconds=GRACE_S))
        self._store.set(f"survived/{self.rank}", "1")
        deadline = time.monotonic() + GRACE_S
        silent = set(range(self.size))
        while silent and time.monotonic() < deadline:
            silent -= {rank for rank in silent if self._store.check([f"survived/{rank}"])}
            time.sleep(0.1)
        last = {rank: self._store.check([f"step/{rank}"]) for rank in silent}
        return {rank: int(self._store.get(f"step/{rank}")) if is_there else 0 for rank, is_there in last.items()}

    def _hosts_with_errors(self, silent: Iterable[int]) -> dict[int, str]:
        """Return the machines of those silent ranks that posted their own error."""
        assert self._store is not None
        posted = [rank for rank in silent if self._store.check([f"error/{rank}"])]
        return {rank: self._store.get(f"error/{rank}").decode() for rank in posted}


def nccl_error(groups: Iterable[Any]) -> str | None:
    """Return the error that torch's watchdog found in one of these process groups, or None.

    Only this rank's own observation counts: a rank that hangs before a collective has observed nothing.
    """
    for group in groups:
        # A group without a GPU backend raises RuntimeError; gloo, which also serves GPUs, raises AttributeError.
        with contextlib.suppress(RuntimeError, AttributeError):
            found = group._get_backend(torch.device("cuda")).get_error()
            if found.name in ("TIMEOUT", "COMM_ERROR"):
                return f"NCCL {'timeout' if found.name == 'TIMEOUT' else 'communication error'}"
    return None


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether an error comes from a collective: a peer left, or did not arrive within the timeout."""
    words = ("gloo", "NCCL", "onnection closed", "onnection reset", "imed out", "imeout")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def loss_sentence(silent: dict[int, int] | None, step: int) -> str:
    """Return the sentence about lost ranks.

    Args:
        silent: The lost ranks, each with the last step that it began; None if that is not known.
        step: This rank's step.
    """
    if silent is None:
        return f"A collective failed in step {step} and the launcher does not answer; rerun the same command to resume."
    if not silent:
        return (
            f"A collective failed in step {step} although every rank still answers; rerun the same command to resume."
        )
    names = ", ".join(f"rank {rank} (in step {begun})" for rank, begun in sorted(silent.items()))
    verb = "does" if len(silent) == 1 else "do"
    return (
        f"{names} {verb} not answer while the others are in step {step}; the same command resumes from the checkpoint."
    )
