"""Runs through a real SLURM cluster of one node: a sweep as a job array, and a job that is asked to stop twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, quiet_environment
from tests.interrupted import interrupted, records_of, tensors_of
from tests.processes import last_step
from tests.slurm import missing_for_slurm, output, slurm, wait_for
from tests.test_run import tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
LAUNCHER = ("launch", "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.signal_delay_s=30")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := missing_for_slurm():
        pytest.skip(why)
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'sparsellm[slurm]'")
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def start(cluster: dict[str, str], arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "w") as words:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=quiet_environment(cluster), stdout=words, stderr=words
        )


def jobs(cluster: dict[str, str]) -> list[str]:
    return output(["squeue", "--noheader", "--array", "--format=%T"], cluster).split()


def test_a_sweep_is_a_job_array_of_fsdp2_runs_with_a_table_and_a_figure(cluster, folder):
    arguments = [
        *LAUNCHER, *(item for item in tiny(folder, "logger=none") if not item.startswith("run_name")),
        "trainer.max_steps=8", "sweep_name=slurm", "sparsity.target=0,0.5,0.8", "launch.num_processes=2",
    ]  # fmt: skip
    log = folder / "sweep.log"
    assert start(cluster, arguments, log).wait(400) == 0, log.read_text()[-3000:]
    sweep = folder / "runs" / "slurm"
    rows = [line for line in log.read_text().splitlines() if line.startswith("| sparsity.target-")]
    assert [row.split()[1] for row in rows] == [f"sparsity.target-{target}" for target in ("0", "0.5", "0.8")]
    for target, row in zip((0, 0.5, 0.8), rows, strict=True):
        summary = json.loads((sweep / f"sparsity.target-{target:g}" / "summary.json").read_text())
        assert (summary["world_size"], summary["fsdp_version"]) == (2, 2)
        assert f"{summary['final_train_loss']:.3f}" in row
    assert (sweep / "sweep.png").stat().st_size > 10_000
    scripts = [file.read_text() for file in (sweep / ".submitit").rglob("*_submission.sh")]
    assert len(scripts) == 1
    assert "#SBATCH --array=0-2" in scripts[0]
    assert "#SBATCH --requeue" in scripts[0]
    again = start(cluster, arguments, log)
    assert again.wait(60) == 0
    assert "nothing is submitted" in log.read_text()


def test_jobs_outlive_a_killed_launcher_and_the_same_command_waits_for_them(cluster, folder):
    arguments = [
        *LAUNCHER, *(item for item in tiny(folder, "logger=none") if not item.startswith("run_name")),
        "trainer.max_steps=200", "sweep_name=orphans", "sparsity.target=0,0.5", "launch.num_processes=1",
    ]  # fmt: skip
    sweep, log = folder / "runs" / "orphans", folder / "orphans.log"
    run = start(cluster, arguments, log)
    wait_for(lambda: last_step(sweep / "sparsity.target-0") >= 20 or run.poll() is not None, 200, "step 20")
    assert run.poll() is None, log.read_text()[-3000:]
    run.kill()
    run.wait()
    assert jobs(cluster), "the jobs ended with their launcher"
    assert start(cluster, arguments, log).wait(400) == 0, log.read_text()[-3000:]
    assert "of an earlier command still run: waiting for them" in log.read_text()
    assert "nothing is submitted" in log.read_text()
    assert len(list((sweep / ".submitit").rglob("*_submission.sh"))) == 1
    for target in ("0", "0.5"):
        assert (sweep / f"sparsity.target-{target}" / "summary.json").exists()


def test_a_job_that_is_warned_and_then_preempted_ends_with_the_same_model(cluster, folder, whole):
    """It gets the signal of a time limit, and later a job of a higher partition preempts it; both times it is requeued."""
    run_dir, log = folder / "runs" / "preempted-by-slurm", folder / "preempted.log"
    command = interrupted(folder, run_dir.name, "logger=none", "trainer.dataloader_num_workers=1")
    run = start(cluster, [*LAUNCHER, *command], log)
    try:
        wait_for(lambda: last_step(run_dir) >= 9 or run.poll() is not None, 200, "step 9")
        assert run.poll() is None, log.read_text()[-3000:]
        (number,) = output(["squeue", "--noheader", "--format=%i"], cluster).split()
        output(["scancel", "--signal=USR2", number], cluster)
        wait_for(lambda: jobs(cluster) == ["PENDING"], 60, "the requeued job")
        stopped_at = last_step(run_dir)
        wait_for(lambda: last_step(run_dir) >= stopped_at + 9 or run.poll() is not None, 200, "more steps")
        assert run.poll() is None, log.read_text()[-3000:]
        output(["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"], cluster)
        assert run.wait(300) == 0, log.read_text()[-3000:]
    finally:
        run.kill()
        run.wait()
    words = "".join(file.read_text() for file in (folder / "runs" / ".submitit" / number).glob("*_log.*"))
    assert words.count("has saved a checkpoint") == 2
    assert words.count("resumed from") == 2
    assert "Traceback" not in words
    assert records_of(run_dir) == records_of(whole)
    assert tensors_of(run_dir, "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def test_a_job_with_a_mistake_ends_and_its_words_are_named(cluster, folder):
    log = folder / "mistake.log"
    command = tiny(folder, "run_name=mistake", "logger=none", f"data.path={folder}/nowhere.jsonl")
    run = start(cluster, [*LAUNCHER, *command], log)
    assert run.wait(120) == 1
    assert "error: mistake did not finish; its words are in" in log.read_text()
    words = "".join(file.read_text() for file in (folder / "runs" / ".submitit").rglob("*_log.err"))
    assert "nowhere.jsonl" in words
