"""Orderly early stop of a run on all ranks: one sentence, said once, and an exit code of its own."""

from __future__ import annotations

PREEMPTED_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command resumes from the checkpoint."""


class RunStopped(Exception):
    """Raised by every rank at the same point, so that they can still leave the process group in order."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code
