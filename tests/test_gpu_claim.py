"""The claim on one GPU: its runs, their overrides, and the page of their results."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf.compose import composed
from tests.commands import ROOT
from tests.gpu import claim
from tests.gpu.claim_page import page, write_runs
from tests.gpu.docstrings import compress, is_below, python_files, read_packages
from train.plan.run import plan_run


def overrides_of(step: Any) -> list[str]:
    """Return the arguments of `python -m launch` at the end of a run's step."""
    return [word for word in step.command[4:] if "=" in word]


def runs(tmp_path: Path) -> dict[str, Any]:
    found = claim.claim_steps(tmp_path, tmp_path, False)
    return {step.name: plan_run(composed("train", overrides_of(step)), 1) for step in found[2:]}


def test_the_claim_has_twins_of_every_sparse_run_and_three_seeds_at_80_percent(tmp_path):
    names = [step.name for step in claim.claim_steps(tmp_path, tmp_path, False)]
    assert names[:8] == [
        "device", "text", "80p-seed0", "80p-seed0-twin", "80p-seed1", "80p-seed1-twin", "80p-seed2", "80p-seed2-twin"
    ]  # fmt: skip
    assert sorted(names[8:]) == sorted(f"{level}p-seed0{twin}" for level in (20, 40, 60) for twin in ("", "-twin"))


def test_every_run_reads_20_tokens_for_each_average_parameter_and_a_twin_is_as_large(tmp_path):
    plans = runs(tmp_path)
    for name, plan in plans.items():
        average = plan.average_density * plan.counts.linear
        assert plan.total_tokens >= 20 * average, name
        assert 2e6 <= average <= 8e6, name
        if plan.twin:
            assert abs(plan.twin.relative_error) < 0.035, name
            assert average == pytest.approx(plans[name.removesuffix("-twin")].average_density * 5_363_712, rel=0.035)
    assert len({plan.total_tokens for plan in plans.values()}) == 1


def test_a_step_names_the_folder_that_its_run_gets(tmp_path):
    for step in (*claim.claim_steps(tmp_path, tmp_path, False)[2:], *claim.rates_steps(tmp_path, tmp_path, False)[2:]):
        assert step.command[3] == str(plan_run(composed("train", overrides_of(step)), 1).run_dir), step.name


def test_what_the_user_adds_overrides_every_run(tmp_path):
    for step in claim.claim_steps(tmp_path, tmp_path, False, ["optim.learning_rate=0.004"])[2:]:
        assert composed("train", overrides_of(step)).trainer.learning_rate == 0.004


def test_rates_are_tuned_on_the_dense_side_with_two_seeds_each(tmp_path):
    found = [composed("train", overrides_of(step)) for step in claim.rates_steps(tmp_path, tmp_path, False)[2:]]
    assert all(config.model.match == "average" for config in found)
    tried = {(config.sparsity.target, config.trainer.learning_rate, config.trainer.seed) for config in found}
    assert len(tried) == len(found) == 2 * 4 * 2


def test_each_pair_takes_the_rate_of_its_sparsity_from_the_rates_beside_its_results(tmp_path):
    losses = {"20p-0.003-seed0": 2.0, "20p-0.006-seed0": 2.1, "80p-0.003-seed0": 2.5, "80p-0.006-seed0": 2.4}
    steps = [
        {"name": name, "outcome": "passed",
         "figures": {"summary": {"learning_rate": float(name.split("-")[1]), "heldout_loss": loss}}}
        for name, loss in losses.items()
    ]  # fmt: skip
    failed = {"name": "20p-0.012-seed0", "outcome": "failed", "figures": None}
    (tmp_path / "rates.json").write_text(json.dumps({"steps": [*steps, failed]}))
    found = {step.name: step.command for step in claim.claim_steps(tmp_path, tmp_path, False)[2:]}
    for name, rate in (
        ("20p-seed0", "0.003"),
        ("40p-seed0-twin", "0.00378"),
        ("60p-seed0", "0.00476"),
        ("80p-seed1", "0.006"),
    ):
        assert f"optim.learning_rate={rate}" in found[name]
    assert claim.rate_at(0.9, {0.2: 0.003, 0.8: 0.006}) == 0.006
    assert claim.rate_at(0.1, {0.2: 0.003, 0.8: 0.006}) == 0.003


def result(folder: Path) -> Path:
    """Write a results file of six runs whose loss depends on N-bar."""
    steps: list[dict[str, Any]] = [
        {"name": "device", "outcome": "passed", "seconds": 5.0, "figures": {"gpu": "NVIDIA H100", "torch": "2.11.0"}},
        {"name": "60p-seed0", "outcome": "timed out", "seconds": 9.0, "figures": None},
    ]
    for target, average in ((0.2, 0.9), (0.4, 0.77), (0.8, 0.4)):
        for twin in (False, True):
            linear = 7e6 * (average if twin else 1.0)
            summary = {
                "avg_linear_params": 7e6 * average, "linear_params": linear, "total_tokens": 1e8, "learning_rate": 0.006,
                "nonzero_linear_params": linear if twin else linear * (1 - target), "sparsity": 0.0 if twin else target,
                "heldout_loss": 10 / (7e6 * average) ** 0.1, "bits_per_byte": 1.0, "final_train_loss": 2.0,
            }  # fmt: skip
            settings = ["experiment=claim", f"sparsity.target={target}", *([claim.TWIN] if twin else [])]
            config = OmegaConf.to_yaml(OmegaConf.structured(composed("train", settings)))
            name = f"{100 * target:g}p-seed0" + ("-twin" if twin else "")
            figures = {"name": name, "config": config, "summary": summary}
            steps.append({"name": name, "outcome": "passed", "seconds": 60.0, "figures": figures})
    folder.mkdir()
    content = {"command": "python -m tests.gpu claim", "started": "2026-11-26T17:00:00", "steps": steps}
    (folder / "claim.json").write_text(json.dumps(content))
    return folder


def test_the_page_compares_the_runs_that_the_file_holds(tmp_path):
    text = page(result(tmp_path / "gpu"), tmp_path / "claim.png")
    assert "NVIDIA H100, torch 2.11.0" in text
    assert "| 80p-seed0-twin | 2.800 M |" in text
    assert "| 60p-seed0 |  |  |  | timed out |" in text
    assert "target=0.8" in text
    assert "+0.0000" in text
    assert "alpha             0.1 " in text
    assert (tmp_path / "claim.png").stat().st_size > 1000


def test_a_run_that_did_not_end_leaves_no_folder(tmp_path):
    content = json.loads((result(tmp_path / "gpu") / "claim.json").read_text())
    assert {path.name for path in write_runs(content, tmp_path / "runs")} == {
        f"{level}p-seed0{twin}" for level in (20, 40, 80) for twin in ("", "-twin")
    }


@pytest.mark.skipif(
    not (ROOT / "docs" / "gpu" / "claim.json").is_file(), reason="no results of the claim are committed"
)
def test_the_page_of_the_claim_is_made_of_its_files():
    assert (ROOT / "docs" / "claim.md").read_text(encoding="utf-8") == page(ROOT / "docs" / "gpu")


def test_only_python_files_below_its_root_leave_a_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in ("a/b.py", "a/c.so", "../d.py"):
            wheel.writestr(name, "x = 1")
    assert python_files(tmp_path / "a.whl", tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["b.py"]
    assert not is_below("/etc/x.py")


def test_packages_are_read_from_a_list_with_comments(tmp_path):
    (tmp_path / "list.txt").write_text("# docs\nnumpy==2.4.6\n\nsympy==1.14  # mathematics\n")
    assert read_packages(tmp_path / "list.txt") == ["numpy==2.4.6", "sympy==1.14"]


def test_the_same_text_gives_the_same_compressed_file(tmp_path):
    written = []
    for _ in range(2):
        (tmp_path / "part-0.jsonl").write_text('{"text": "a"}\n')
        assert compress(tmp_path) == 14
        written.append((tmp_path / "part-0.jsonl.gz").read_bytes())
    assert written[0] == written[1]
    assert gzip.decompress(written[0]) == b'{"text": "a"}\n'
