"""The end of processes, with their parent or by themselves. The launcher uses this too, so it does not import torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
AGENT = "SPARSELLM_AGENT"
"""The environment variable that tells ranks the process id of the agent that starts them."""


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent dies (on Linux; elsewhere this does nothing).

    The signal is SIGKILL, because a rank that waits in a collective for lost peers cannot handle anything else.

    Args:
        parent: The parent's process id; if given, the process also ends if that parent has already died.
    """
    parent = parent or os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def end_process_after(body: Callable[[], None]) -> NoReturn:
    """Call `body`, then end the process with the code of its SystemExit, or with 0; other exceptions pass through."""
    code = 0
    try:
        body()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End the process without Python's own shutdown, in which threads of a closed process group sometimes abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
