"""Checks of the wandb account, mode and library on this machine, made without importing wandb."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from importlib.util import find_spec

from conf.schema import LoggerConfig
from conf.schema.checks import check

MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
"""The values of WANDB_MODE that wandb accepts."""


def check_wandb(logger: LoggerConfig, environment: Mapping[str, str]) -> None:
    """Check that wandb can start if it is wanted, before the data is prepared.

    Raises:
        ValueError: The library or the account is missing, or the mode is unknown.
    """
    if not logger.wandb:
        return
    check(
        find_spec("wandb") is not None, "logger=wandb needs the library wandb: pip install wandb, or take logger=none."
    )
    asked = environment.get("WANDB_MODE") if logger.mode == "auto" else logger.mode
    mode = asked if logger.mode == "auto" else None
    check(
        asked != "online" or has_wandb_key() or "WANDB_IDENTITY_TOKEN_FILE" in environment,
        f"{'WANDB_MODE' if mode else 'logger.mode'}=online needs an account: run `wandb login` or set WANDB_API_KEY, or take "
        "logger.mode=offline.",
    )
    check(
        not mode or mode in MODES,
        f"WANDB_MODE={mode} is not known to wandb: set one of {', '.join(MODES)}, or take logger.mode=offline or logger=none.",
    )


def has_wandb_key() -> bool:
    """Return whether a wandb key is configured, by `wandb login` or in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
