"""Check and measure the project in a few minutes on one GPU; `--rehearse` runs the same steps, but tiny, on CPUs.

    python -m tests.gpu check [--rehearse]     correctness: tests, demo, interruption, 30 steps of the 1B; 5 minutes at most
    python -m tests.gpu bench [--rehearse]     speed: event, tokens a second, profile, memory; 5 minutes at most
    python -m tests.gpu rates [--rehearse]     learning rates of the claim's runs; 4 minutes at most
    python -m tests.gpu claim [--rehearse]     the paper's claim: sparse runs and their dense twins; 9 minutes at most
    python -m tests.gpu recipe [--rehearse]    which points of the authors' recipe matter; 9 minutes at most, or on CPUs

`claim`, `rates` and `recipe` also take overrides of their runs (optim.learning_rate=0.004). They read the docstrings of this
Python environment; `data=text data.path=FOLDER` gives them more, such as the folder that `python -m tests.gpu.docstrings`
writes. If the folder of results holds rates.json, `claim` gives each pair the learning rate that was best there.

A line is printed for each step when it ends. The results are in $OUT (or, if it is not set, in runs/gpu): COMMAND.json,
written again after each step, and COMMAND.log with the end of what each step printed. Exits with 1 unless every step that ran
passed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.gpu import bench, check, claim, recipe
from tests.gpu.runner import ROOT, Step, run_steps


@dataclass(frozen=True)
class Command:
    """A command: its steps, the seconds that they may take together, and how many run at a time."""

    steps: Callable[[Path, Path, bool, Sequence[str]], list[Step]]
    budget_s: float = 300.0
    parallel: int = 10
    takes_overrides: bool = False


COMMANDS = {
    "check": Command(check.steps),
    "bench": Command(bench.steps),
    "rates": Command(claim.rates_steps, budget_s=240.0, parallel=6, takes_overrides=True),
    "claim": Command(claim.claim_steps, budget_s=530.0, parallel=6, takes_overrides=True),
    "recipe": Command(recipe.recipe_steps, budget_s=530.0, parallel=6, takes_overrides=True),
}
REHEARSAL_BUDGET_S = 1800.0
"""The seconds of a rehearsal, which takes minutes on an idle machine: enough to finish on a busy one."""
REHEARSAL_PARALLEL = 2
REHEARSAL_PATIENCE = 4.0
"""The factor on the time that a step may take in a rehearsal."""


def environment(rehearse: bool, work: Path) -> dict[str, str]:
    """Return the environment variables of every step: offline, unbuffered, at most one device, this checkout first."""
    python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}),
        "PYTHONPATH": os.pathsep.join(python_path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "SPARSELLM_CACHE": str(work / "cache"),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS], metavar="|".join(COMMANDS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run of claim, rates and recipe")
    parser.add_argument("--rehearse", action="store_true", help="the same steps at a tiny size on the CPU")
    parser.add_argument("--only", default="", help="only the steps whose name contains this")
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds for all steps; without it what the command says above, or 1,800 in a rehearsal",
    )
    parser.add_argument("--parallel", type=int, default=None, help="steps at a time, where a step need not be alone")
    parser.add_argument("--list", action="store_true", help="print the steps and the seconds they are expected to take")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not COMMANDS[options.command].takes_overrides:
        parser.error(
            f"{options.overrides[0]} is an override of a run, which {options.command} does not take: leave it out."
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    output = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu").resolve()
    with tempfile.TemporaryDirectory(prefix="sparsellm-gpu-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        command = COMMANDS[options.command]
        steps = command.steps(work, output, options.rehearse, options.overrides)
        steps = [step for step in steps if options.only in step.name]
        if options.rehearse:
            steps = [replace(step, timeout_s=REHEARSAL_PATIENCE * step.timeout_s) for step in steps]
        if options.list:
            for step in steps:
                alone = "alone" if step.alone else ""
                print(f"{step.name:<34} {step.expected_s:4.0f} s, at most {step.timeout_s:4.0f} s  {alone}")
            return 0
        details = {
            "rehearsal": options.rehearse, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": platform.node(),
            "python": platform.python_version(),
        }  # fmt: skip
        (work / "output").mkdir()
        results = run_steps(
            options.command, steps, output, details=details, work=work / "output",
            budget_s=options.budget or (REHEARSAL_BUDGET_S if options.rehearse else command.budget_s),
            parallel=options.parallel or (REHEARSAL_PARALLEL if options.rehearse else command.parallel),
            environment=environment(options.rehearse, work),
        )  # fmt: skip
    outcomes = ("passed", "failed", "timed out", "not run")
    counts = {name: sum(result.outcome == name for result in results) for name in outcomes}
    print(", ".join(f"{number} {name}" for name, number in counts.items() if number) + f"; see {output}", flush=True)
    return int(counts["failed"] + counts["timed out"] > 0)


if __name__ == "__main__":
    sys.exit(main())
