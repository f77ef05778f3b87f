"""The check whether the Hugging Face hub answers; its own client retries for most of a minute before it gives up."""

from __future__ import annotations

from functools import cache

SECONDS = 10.0


@cache
def is_reachable() -> bool:
    """Return whether the hub answers a request in any way; it is asked once per process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:
        return False
    return True
