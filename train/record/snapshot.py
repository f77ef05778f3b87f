"""environment.json: the code, environment and command of each start of a run."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from sparsity.common.files import write_atomically
from sparsity.common.programs import run_program
from train.distributed import World

ROOT = Path(__file__).resolve().parents[2]
KEPT = (
    "ACCELERATE_", "CUDA_", "FSDP_", "GLOO_", "HF_", "MASTER_", "NCCL_", "NVIDIA_", "OMP_", "PARALLELISM_CONFIG_",
    "PYTHONHASHSEED", "PYTHONPATH", "PYTORCH_", "SLURM_", "TOKENIZERS_", "TORCH", "WANDB_", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)  # fmt: skip
"""Prefixes of the environment variables that are recorded; all others are left out."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "CREDENTIAL", "AUTH", "JWT", "COOKIE")
"""Variables with these words in their names are never recorded."""


def write_snapshot(path: Path, world: World) -> None:
    """Add this start to the run's environment.json. Only rank 0 calls this."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = []
    write_atomically(path, json.dumps([*before, snapshot(os.environ, sys.argv, world)], indent=2) + "\n")


def snapshot(environment: Mapping[str, str], command: list[str], world: World) -> dict[str, Any]:
    """Return a description of this start of a run, as plain data.

    Args:
        environment: The process's variables.
        command: Its command line.
        world: This process and its peers.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["python", "-m", "train", *map(without_credentials, command[1:])],
        "folder": os.getcwd(),
        "code": code_version(ROOT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "world_size": world.size,
        "devices": devices(),
        "packages": packages(),
        "variables": kept_variables(environment),
    }


def packages() -> dict[str, str]:
    """Return the installed packages' versions by name, sorted."""
    # Each access to `metadata` parses the package's file anew; `version` is one too.
    found = [distribution.metadata for distribution in distributions()]
    return dict(sorted((str(metadata["Name"]), str(metadata["Version"])) for metadata in found))


def kept_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that affect the run and hold no secret, sorted by name."""
    names = [name for name in environment if name.startswith(KEPT) and not is_secret(name)]
    return {name: without_credentials(environment[name]) for name in sorted(names)}


def is_secret(name: str) -> bool:
    """Return whether a variable may hold a secret, judged by its name."""
    return any(word in name.upper().removeprefix("TOKENIZERS_") for word in SECRET)


def without_credentials(text: str) -> str:
    """Remove users and passwords from the URLs in `text`."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def code_version(root: Path) -> dict[str, Any]:
    """Return the package's version, its commit (None outside a repository), and whether files differ from the commit."""
    try:
        package = version("sparsellm")
    except PackageNotFoundError:
        package = None
    # If the environment is installed inside another repository, that repository's commit says nothing about this code.
    if not git(root, "ls-files", "train/record/snapshot.py"):
        return {"version": package, "commit": None, "dirty": None}
    status = git(root, "status", "--porcelain", "--untracked-files=no")
    return {"version": package, "commit": git(root, "rev-parse", "HEAD"), "dirty": bool(status)}


def git(root: Path, *words: str) -> str | None:
    """Return the output of a git command in `root`; None if it fails."""
    try:
        done = run_program(["git", "-C", str(root), *words], timeout_s=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def devices() -> list[str]:
    """Return the names of this machine's GPUs, or if there is none, a description of its CPU."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return names or [f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}"]
