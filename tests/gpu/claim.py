"""The steps of `python -m tests.gpu claim` and `rates`: the paper's claim at the size of one GPU, and its learning rates.

Both train several runs at a time on the one device. A run is a process tree of its own, as users start it. Wider models need
lower rates, so `rates` tunes the twins of two sparsities, and `claim` takes each pair's rate from its results.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.check import write_rehearsal_text
from tests.gpu.runner import Step

PYTHON = sys.executable
SPARSITIES = (0.2, 0.4, 0.6)
"""The sparsities in addition to 80 %, with one seed each."""
SEEDS = (0, 1, 2)
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
RATE_SPARSITIES = (0.2, 0.8)
"""The twins whose rates are tuned: the widest and the narrowest."""
RATE_SEEDS = (0, 1)
RATE_STEPS = 576
RATES_FILE = "rates.json"
TWIN = "model.match=average"
RUN_SECONDS, REHEARSED_SECONDS = 60.0, 5.0
"""The seconds of the budget that must be left for another run to start."""
RUN_LIMIT_S = 420.0


@dataclass(frozen=True)
class Arm:
    """One run: its `run_name`, and the overrides with which it differs from experiment=claim."""

    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The name of the run's folder, which shows whether it is a twin."""
        return f"{self.name}-twin" if TWIN in self.overrides else self.name


def claim_arms(rates: Mapping[float, float] | None = None) -> list[Arm]:
    """Return four sparsities and their dense twins, three seeds of the 80 % pair; the most important come first.

    Args:
        rates: Tuned learning rates by sparsity, see `rate_at`; without them, all runs have that of experiment=claim.
    """
    pairs = [(0.8, seed) for seed in SEEDS] + [(sparsity, 0) for sparsity in SPARSITIES]
    found = []
    for sparsity, seed in pairs:
        rate = (f"optim.learning_rate={rate_at(sparsity, rates):.3g}",) if rates else ()
        found += pair(sparsity, seed, *rate)
    return found


def pair(sparsity: float, seed: int, *more: str) -> tuple[Arm, Arm]:
    name = f"{100 * sparsity:g}p-seed{seed}"
    overrides = (f"sparsity.target={sparsity:g}", f"trainer.seed={seed}", *more)
    return Arm(name, overrides), Arm(name, (*overrides, TWIN))


def rate_arms() -> list[Arm]:
    """Return the twins of the 20 % and the 80 % run at four learning rates and two seeds."""
    return [
        Arm(
            f"{100 * sparsity:g}p-{rate:g}-seed{seed}",
            (
                f"sparsity.target={sparsity:g}", TWIN, f"optim.learning_rate={rate:g}", f"trainer.seed={seed}",
                f"trainer.max_steps={RATE_STEPS}",
            ),
        )
        for sparsity in RATE_SPARSITIES
        for seed in RATE_SEEDS
        for rate in RATES
    ]  # fmt: skip


def tuned_rates(result: Mapping[str, Any]) -> dict[float, float]:
    """Return, by sparsity, the learning rate with the lowest mean held-out loss in a results file of `rates`."""
    losses: dict[float, dict[float, list[float]]] = {}
    for step in result["steps"]:
        summary = (step.get("figures") or {}).get("summary")
        level = step["name"].split("-")[0]
        if step["outcome"] == "passed" and summary and level.endswith("p"):
            by_rate = losses.setdefault(float(level[:-1]) / 100, {})
            by_rate.setdefault(summary["learning_rate"], []).append(summary["heldout_loss"])
    return {level: min(found, key=lambda rate: statistics.fmean(found[rate])) for level, found in losses.items()}


def rate_at(sparsity: float, tuned: Mapping[float, float]) -> float:
    """Return the learning rate at a sparsity: between two tuned ones its logarithm is linear, outside it is the nearest."""
    below = max((level for level in tuned if level <= sparsity), default=min(tuned))
    above = min((level for level in tuned if level >= sparsity), default=max(tuned))
    if above == below:
        return tuned[below]
    share = min(max((sparsity - below) / (above - below), 0.0), 1.0)
    return math.exp((1 - share) * math.log(tuned[below]) + share * math.log(tuned[above]))


def claim_steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    """Return the claim's steps, with the learning rates of rates.json if the folder of results has one."""
    file = output / RATES_FILE
    rates = tuned_rates(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    return steps(claim_arms(rates), work, rehearse, more)


def rates_steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    return steps(rate_arms(), work, rehearse, more)


def steps(arms: Sequence[Arm], work: Path, rehearse: bool, more: Sequence[str]) -> list[Step]:
    """Return the device, the text, then the runs. `more` are overrides of every run, such as another text."""
    shared = shared_overrides(work, rehearse, more)
    return [*start_steps(shared, rehearse), *(run_step(arm, work, shared, rehearse) for arm in arms)]


def shared_overrides(work: Path, rehearse: bool, more: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides of every run, and write the text of a rehearsal."""
    if rehearse:
        write_rehearsal_text(work / "text")
    return (*common(work, rehearse), *more)


def start_steps(shared: Sequence[str], rehearse: bool) -> list[Step]:
    """Return the steps that tell the device and prepare the text."""
    tiny = ("--rehearse",) if rehearse or shutil.which("nvidia-smi") is None else ()
    cores = {"TOKENIZERS_PARALLELISM": "true"}
    return [
        Step("device", (PYTHON, "-m", "tests.gpu.device", *tiny), expected_s=10, timeout_s=60, alone=True),
        Step(
            "text", (PYTHON, "-m", "tests.gpu.claim_text", *shared), expected_s=20, timeout_s=180, alone=True, environment=cores
        ),
    ]  # fmt: skip


def run_step(arm: Arm, work: Path, shared: Sequence[str], rehearse: bool) -> Step:
    # If a key is given twice, the last value counts, so the shared overrides take precedence over the arm's.
    command = (
        PYTHON, "-m", "tests.gpu.claim_run", str(work / "runs" / arm.folder), f"run_name={arm.name}", *arm.overrides, *shared,
    )  # fmt: skip
    expected = REHEARSED_SECONDS if rehearse else RUN_SECONDS
    return Step(arm.folder, command, expected_s=expected, timeout_s=RUN_LIMIT_S, says="held-out loss")


def common(work: Path, rehearse: bool) -> list[str]:
    found = [
        "experiment=claim", f"runs_dir={work}/runs", f"data.cache_dir={work}/cache-claim", "logger=none",
        "trainer.disable_tqdm=true", "overwrite=true",
    ]  # fmt: skip
    if rehearse:
        found += [
            "data=text", f"data.path={work}/text", "model=llama_micro", "model.max_position_embeddings=64",
            "model.vocab_size=300", "data.heldout_share=0.1", "trainer.tf32=null", "trainer.bf16=false",
            "trainer.torch_compile=false", "trainer.dataloader_num_workers=0", "batch_size=8",
            "trainer.per_device_train_batch_size=8", "trainer.logging_steps=2", "launch.num_processes=1",
            "trainer.max_steps=12",
        ]  # fmt: skip
    return found
