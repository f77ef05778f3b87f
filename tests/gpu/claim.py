"""The steps of `python -m tests.gpu claim` and `rates`: the paper's claim at the size of one GPU, and its learning rate.

Both train several runs at a time on one device. Each run has its own processes, as if a user had started it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.check import write_rehearsal_text
from tests.gpu.runner import Step

PYTHON = sys.executable
SPARSITIES = (0.2, 0.4, 0.6)
"""The sparsities in addition to 80 %, with one seed each."""
SEEDS = (0, 1, 2)
RATES = (3e-3, 6e-3, 1.2e-2)
RATE_SEEDS = (0, 1)
RATE_STEPS = 384
RECIPES = ("authors", "plain")
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


def claim_arms() -> list[Arm]:
    """Return runs at four sparsities and their dense twins, with three seeds of the 80 % pair, most important first."""
    pairs = [(0.8, seed) for seed in SEEDS] + [(sparsity, 0) for sparsity in SPARSITIES]
    return [arm for sparsity, seed in pairs for arm in pair(sparsity, seed)]


def pair(sparsity: float, seed: int, *more: str) -> tuple[Arm, Arm]:
    name = f"{100 * sparsity:g}p-seed{seed}"
    overrides = (f"sparsity.target={sparsity:g}", f"trainer.seed={seed}", *more)
    return Arm(name, overrides), Arm(name, (*overrides, TWIN))


def rate_arms() -> list[Arm]:
    """Return runs of the 80 % run's twin at three learning rates, with two seeds and both recipes."""
    return [
        Arm(
            f"{recipe}-{rate:g}-seed{seed}",
            (
                f"recipe={recipe}", "sparsity.target=0.8", TWIN, f"optim.learning_rate={rate:g}", f"trainer.seed={seed}",
                f"trainer.max_steps={RATE_STEPS}",
            ),
        )
        for recipe in RECIPES
        for seed in RATE_SEEDS
        for rate in RATES
    ]  # fmt: skip


def claim_steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    return steps(claim_arms(), work, rehearse, more)


def rates_steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    return steps(rate_arms(), work, rehearse, more)


def steps(arms: Sequence[Arm], work: Path, rehearse: bool, more: Sequence[str]) -> list[Step]:
    """Return the steps: the device, the text, then the runs. `more` are overrides of every run, such as another text."""
    if rehearse:
        write_rehearsal_text(work / "text")
    shared = (*common(work, rehearse), *more)
    tiny = ("--rehearse",) if rehearse else ()
    cores = {"TOKENIZERS_PARALLELISM": "true"}
    found = [
        Step("device", (PYTHON, "-m", "tests.gpu.device", *tiny), expected_s=10, timeout_s=60, alone=True),
        Step(
            "text", (PYTHON, "-m", "tests.gpu.claim_text", *shared), expected_s=20, timeout_s=180, alone=True, environment=cores
        ),
    ]  # fmt: skip
    return [*found, *(run_step(arm, work, shared, rehearse) for arm in arms)]


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
