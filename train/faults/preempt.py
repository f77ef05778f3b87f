"""The signals by which a cluster asks for its machines back, and Ctrl-C: the step is ended and saved, a second one
obeyed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from train.faults.stop import PREEMPTED_CODE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Preemption; by convention a time limit that comes near; the same as submitit has it sent; a person's Ctrl-C."""
SAME_REQUEST_S = 1.0
"""SLURM and the launcher may both deliver the first request."""


class Preemption:
    """`is_requested` after the first signal. A thread listens: even a process that waits in a collective obeys the second.

    Outside `at_step_ends` there is nothing to save that is not saved, and the first signal ends the process at once.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.at_step_ends = False
        self._first_s = 0.0

    def listen(self) -> None:
        """Take the signals over; called once, by the main thread."""
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
        if not self.is_requested:
            self.is_requested, self._first_s = True, time.monotonic()
            if not self.at_step_ends:
                os._exit(PREEMPTED_CODE)
        elif time.monotonic() - self._first_s > SAME_REQUEST_S:
            os._exit(128 + number)


def end_when_asked() -> None:
    """End the process as preempted at the first signal, until another handler takes over: there is nothing to save yet.

    Call it first in a process: importing torch takes seconds, in which a request must not look like a failure. It
    raises SystemExit, as Ctrl-C raises KeyboardInterrupt, so that callers can clean up.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(PREEMPTED_CODE))


def start_unheeding(then: Callable[[int], None] | None, worker: int) -> None:
    """Ignore signals in a data worker: its rank decides when to end, but SLURM signals every process of a job.

    torch would let SIGTERM kill the worker, and with it the rank before it has saved.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)
