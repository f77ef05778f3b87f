"""The examples run as their first lines say, and give the results that they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.commands import ROOT, quiet_environment

EXAMPLES = ROOT / "examples"


def run_example(name: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, env=quiet_environment({}), capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def densities(output: str) -> list[float]:
    """Return the densities of the lines `step 25  loss 4.1  density 1.000`."""
    return [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step ")]


def losses(output: str) -> list[float]:
    return [float(line.split()[3]) for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.slow
def test_a_sparse_model_is_pruned_in_a_plain_trainer_and_fine_tuned_with_its_zeros(folder: Path):
    output = run_example("prune_in_trainer.py", folder)
    assert densities(output)[0] == 1.0
    assert densities(output)[-1] == 0.2
    assert losses(output)[-1] < 2.8
    assert (folder / "runs" / "example-sparse" / "model.safetensors").is_file()

    output = run_example("finetune_with_fixed_masks.py", folder)
    assert set(densities(output)) == {0.2}
    assert losses(output)[0] < 2.9
    assert "the same after: True" in output


@pytest.mark.slow
def test_two_of_four_weights_stay(folder: Path):
    output = run_example("two_four.py", folder)
    assert densities(output)[-1] == 0.5
    assert "zeros in each group of four: 2 to 2" in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_sweeps_fits_the_law_and_predicts(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for key, value in quiet_environment({}).items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(EXAMPLES / "sweep_and_law.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before a commit"
    nbclient.NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(folder)}}).execute()

    runs = folder / "runs" / "law-example" / "runs"
    assert len(list(runs.glob("*/summary.json"))) == 4
    assert (folder / "runs" / "law-example" / "law.png").is_file()
    assert (folder / "runs" / "law-example" / "report.html").is_file()
    predicted = json.loads((folder / "runs" / "law-example" / "law.json").read_text())["predict"]
    assert 1 < predicted["loss"] < 7
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
