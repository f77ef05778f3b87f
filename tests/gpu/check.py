"""The steps of `python -m tests.gpu check`: whether everything is correct on this device."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.runner import ROOT, Step

PYTHON = sys.executable
GPU_MARK = re.compile(r"^\s*(@|pytestmark\s*=.*|)pytest\.mark\.gpu\b", re.MULTILINE)
MORE_CORES = {"OMP_NUM_THREADS": "8", "TORCHINDUCTOR_COMPILE_THREADS": "16"}
"""The environment of steps that run alone; the CPU draws the 1B's first weights and writes its sample."""
EXPECTED_TEST_S = 25.0
TEST_LIMIT_S = 120.0
LONGER_S = {"test_compile_modes_gpu": 270.0, "test_no_sync_gpu": 200.0, "test_decode_gpu": 200.0}
"""Limits of the test modules that need more: they tune kernels, start four processes, or compile several graphs."""
SLOWEST_FIRST = (
    "test_compile_modes_gpu",
    "test_no_sync_gpu",
    "test_decode_gpu",
    "test_interruption_gpu",
    "test_async_save_gpu",
    "test_determinism_gpu",
    "test_fp8_gpu",
)
"""Test modules that launch runs or compile: they start first, so that the parallel steps end together."""


def gpu_test_files(root: Path = ROOT) -> list[str]:
    """Return the test modules with a test marked `gpu`, relative to the root, the slowest first."""
    files = [
        path
        for path in sorted((root / "tests").rglob("test_*.py"))
        if GPU_MARK.search(path.read_text(encoding="utf-8"))
    ]
    ranks = {name: rank for rank, name in enumerate(SLOWEST_FIRST)}
    files.sort(key=lambda path: ranks.get(path.stem, len(ranks)))
    return [str(path.relative_to(root)) for path in files]


def pytest_step(file: str, rehearse: bool) -> Step:
    limit_s = LONGER_S.get(Path(file).stem, TEST_LIMIT_S)
    command = (
        PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rsxfE", "--durations=3",
        f"--timeout={limit_s - 10 if not rehearse else 400:.0f}", file,
    )  # fmt: skip
    return Step(Path(file).stem, command, expected_s=EXPECTED_TEST_S, timeout_s=limit_s)


def demo(work: Path, rehearse: bool) -> Step:
    """Return the run of `make demo` with a third of its steps; a rehearsal trains on the text of this repository."""
    command = [
        PYTHON, "-m", "launch", "experiment=demo", "overwrite=true", "logger=none", f"runs_dir={work}/demo",
        f"data.cache_dir={work}/cache-demo", "trainer.disable_tqdm=true", "trainer.max_steps=320",
    ]  # fmt: skip
    if rehearse:
        command += [
            "data=text", f"data.path={work}/text", "model=llama_micro", "model.max_position_embeddings=64",
            "model.vocab_size=300", "data.heldout_share=0.1", "trainer.max_steps=12",
        ]  # fmt: skip
    return Step("demo", tuple(command), expected_s=60, timeout_s=180, says="tokens a second")


def steps(work: Path, output: Path, rehearse: bool, more: Sequence[str] = ()) -> list[Step]:
    """Return the steps: the device, the 1B alone, then all tests with the demo.

    The 1B does not come last, because a step that is alone waits for the slowest test, and no time might be left for it.
    """
    tiny = ("--rehearse",) if rehearse else ()
    if rehearse:
        write_rehearsal_text(work / "text")
    return [
        Step("device", (PYTHON, "-m", "tests.gpu.device", *tiny), expected_s=15, timeout_s=60, alone=True),
        Step(
            "1B: 30 compiled steps, 3 events, export",
            (PYTHON, "-m", "tests.gpu.large_run", "--work", str(work / "large"), *tiny),
            expected_s=70, timeout_s=150, alone=True, environment=MORE_CORES,
        ),
        demo(work, rehearse),
        *(pytest_step(file, rehearse) for file in gpu_test_files()),
    ]  # fmt: skip


def write_rehearsal_text(folder: Path) -> None:
    from tests.tiny_run import write_text

    folder.mkdir(parents=True)
    write_text(folder / "text.jsonl")
