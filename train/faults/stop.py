"""Orderly early stop of a run on all ranks, with one message and an exit code."""

from __future__ import annotations

PREEMPTED_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command resumes from the checkpoint."""


class RunStopped(Exception):
    """Orderly early stop, raised by every rank at the same point, so that they can leave the process group in order."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code
