"""The report of unexpected errors: torch's elastic agent shows that of the first rank, once."""

from __future__ import annotations

import os

FAILED_CODE = 1


def hand_over(error: Exception) -> bool:
    """Save `error` with its traceback for torch's elastic agent; return False if there is no agent.

    Every rank may call it; the agent reports the first.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or os.environ.get("HYDRA_FULL_ERROR") == "1":
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return True
