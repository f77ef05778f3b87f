"""The orderly early stop of a run on all ranks, with one message and an exit code."""

from __future__ import annotations

PREEMPTED_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command resumes the run."""


class RunStopped(Exception):
    """An orderly early stop; every rank raises it at the same point, so that they can leave the process group in order."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code
