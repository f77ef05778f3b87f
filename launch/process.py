"""A child process that ends when its parent does, and passes on what the user signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType

from train.faults.process import die_with_parent

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `command` to its end and return its exit code; signals to this process go to it."""
    end_with_this = partial(die_with_parent, os.getpid())
    child = subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=end_with_this)

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
