"""Signals from a cluster or Ctrl-C that ask a run to stop: the first saves a checkpoint, a second ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from train.faults.stop import PREEMPTED_CODE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""SIGTERM preempts a job, SIGUSR1 by convention announces its time limit, submitit uses SIGUSR2, SIGINT is Ctrl-C."""
SAME_REQUEST_S = 1.0
"""Seconds within which another signal counts as the same request: SLURM and the launcher may both deliver it."""


class Preemption:
    """A listener for requests to stop, which sets `is_requested` at the first signal.

    A thread listens, so that the second signal ends even a process that waits in a collective. While `at_step_ends` is
    False there is nothing to save, and the first signal ends the process at once.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.at_step_ends = False
        self._first_s = 0.0

    def listen(self) -> None:
        """Take over the signals; the main thread calls this once."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True, name="signals").start()

    def _listen(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in SIGNALS:
                    self.receive(number)

    def receive(self, number: int) -> None:
        """Note a request to stop; exit at once if there is nothing to save, or at a second request."""
        if not self.is_requested:
            self.is_requested, self._first_s = True, time.monotonic()
            if not self.at_step_ends:
                os._exit(PREEMPTED_CODE)
        elif time.monotonic() - self._first_s > SAME_REQUEST_S:
            os._exit(128 + number)


def end_when_asked() -> None:
    """Make a signal end the process with the exit code of a preemption, until another handler is installed.

    Call it first in a process: importing torch takes seconds, and a request in that time must not look like a failure.
    The process ends without an exception, because packages may catch exceptions while they are imported.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(PREEMPTED_CODE))


def start_unheeding(then: Callable[[int], None] | None, worker: int) -> None:
    """Ignore signals in a data worker, because its rank decides when to end; SLURM signals every process of a job.

    Otherwise SIGTERM would kill the worker, and torch would then fail the rank before it saves a checkpoint.

    Args:
        then: A worker_init_fn to call afterwards, or None.
        worker: The worker's number.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)
