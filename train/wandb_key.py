"""Whether there is an account of wandb here."""

from __future__ import annotations

import netrc
import os


def has_wandb_key() -> bool:
    """Whether `wandb login` was run here, or a key is in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
