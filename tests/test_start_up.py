"""From the command to the first step: what a rank does not do while it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.commands import ROOT, quiet_environment

PROBE = """
import gc, json, os, runpy, sys

from train.faults import process

passes = []
gc.callbacks.append(lambda phase, info: passes.append(phase))
collect_again = process.collect_again


def tell():
    found = {"passes": len(passes), "modules": sorted({name.partition(".")[0] for name in sys.modules})}
    collect_again()
    print(json.dumps({**found, "collects": gc.isenabled(), "frozen": gc.get_freeze_count()}), flush=True)
    os._exit(0)


process.collect_again = tell
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def test_a_rank_collects_garbage_only_after_its_imports_and_draws_and_logs_nothing_by_then(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "experiment=demo", f"runs_dir={tmp_path}"], cwd=ROOT, env=quiet_environment({}),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # A pass may come before `train.__main__` turns them off.
    assert found["passes"] < 5
    assert found["collects"]
    assert found["frozen"] > 100_000
    assert not {"eval", "launch", "matplotlib", "wandb"} & set(found["modules"])
    assert "transformers" in found["modules"]
