"""Killed launchers, lost ranks and bad numbers in whole runs: the run continues, or it ends soon and says why."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import pytest
from safetensors.torch import load_file

from launch.command import CONFIGS
from tests.commands import errors_in
from tests.interrupted import STEPS, interrupted, one_error, records_of, tensors_of
from tests.processes import is_alive, launched, send
from train.checkpoints.layout import checkpoints, damage

# A module's first test waits for several launches.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def harmed(folder) -> dict[str, Any]:
    """Interrupt a run in four ways and start it again each time, the last time by torch's agent itself."""
    run_dir = folder / "runs" / "harmed"
    command = interrupted(folder, "harmed", "logger=none", "launch.max_restarts=1", "launch.num_processes=2")
    found: dict[str, Any] = {"run_dir": run_dir}

    config_file = str(CONFIGS / "cpu.yaml")
    plain = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config_file,
        "--main_process_port",
        "0",
    ]
    with launched(command, run_dir, [*plain, "-m", "train"]) as run:
        run.wait_for_step(3)
        ranks = run.ranks()
        run.process.send_signal(signal.SIGTERM)
        found["plain code"], found["plain words"] = run.wait(), run.stderr
        found["plain ranks"] = [pid for pid in ranks if is_alive(pid)]
        found["plain checkpoint"] = checkpoints(run_dir / "checkpoints")[0]
        found["plain damage"] = damage(found["plain checkpoint"])

    with launched(command, run_dir) as run:
        run.wait_for_step(9)
        ranks = run.ranks()
        send(run.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(is_alive(pid) for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        found["orphans"] = (len(ranks), [pid for pid in ranks if is_alive(pid)])

    with launched(command, run_dir) as run:
        run.wait_for_step(18)
        run.process.send_signal(signal.SIGUSR1)
        found["preempted code"], found["preempted words"] = run.wait(), run.stderr
        found["preempted damage"] = damage(checkpoints(run_dir / "checkpoints")[0])

    with launched(command, run_dir) as run:
        run.wait_for_step(33)
        send(run.ranks()[1], signal.SIGKILL)
        found["code"], found["words"] = run.wait(), run.stderr
    return found


def test_plain_accelerate_launch_saves_when_it_is_asked_to_end(harmed):
    """The exit code is that of torch's agent, 1; `launch.agent` takes the same arguments and exits with 75."""
    assert harmed["plain code"] not in (0, 75)
    assert "asked to stop and has saved a checkpoint" in harmed["plain words"]
    assert harmed["plain ranks"] == []
    assert harmed["plain damage"] is None


def test_ranks_end_within_ten_seconds_when_their_launcher_is_killed(harmed):
    assert harmed["orphans"] == (2, [])


def test_a_preempted_run_saves_says_so_once_and_ends_with_75(harmed):
    assert harmed["preempted code"] == 75, harmed["preempted words"][-3000:]
    assert len(errors_in(harmed["preempted words"])) == 1
    assert "asked to stop and has saved a checkpoint" in harmed["preempted words"]
    assert "Traceback" not in harmed["preempted words"]
    assert harmed["preempted damage"] is None


def test_a_run_that_lost_a_rank_restarts_itself_and_ends_as_if_nothing_had_happened(harmed, whole):
    assert harmed["code"] == 0, harmed["words"][-3000:]
    assert records_of(harmed["run_dir"]) == records_of(whole)
    assert tensors_of(harmed["run_dir"], "model/*.safetensors") == tensors_of(whole, "model/*.safetensors")


def test_a_second_writer_is_refused_and_a_rank_that_hangs_is_named(folder):
    run_dir = folder / "runs" / "hanging"
    command = interrupted(folder, "hanging", "logger=none", "trainer.ddp_timeout=10", "trainer.max_steps=5000")
    with launched(command, run_dir) as run:
        run.wait_for_step(3)
        assert "in use by a live process" in one_error(command)
        ranks = run.ranks()
        send(ranks[1], signal.SIGSTOP)
        started = time.monotonic()
        code = run.wait()
        assert code not in (0, 75)
        # This covers the timeout, the survivors' grace, and the half minute that torch's agent gives the stopped rank to end.
        assert time.monotonic() - started < 120
        first = errors_in(run.stderr)[0]
        assert "rank 1 (in step" in first, run.stderr[-2000:]
        assert "does not answer" in first
        assert not any(is_alive(pid) for pid in ranks)


def test_numbers_that_stay_bad_end_the_run_behind_a_checkpoint(folder):
    command = interrupted(folder, "bad", "logger=none", "optim.learning_rate=1e30", "max_skipped=2")
    said = one_error(command)
    assert "not finite in 3 steps in a row, more than max_skipped=2" in said
    newest = checkpoints(folder / "runs" / "bad" / "checkpoints")[0]
    assert damage(newest) is None
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "rank-00000.safetensors").values())


def test_steps_of_the_shared_run_are_what_these_tests_count_on(whole):
    assert records_of(whole)[-1]["train/global_step"] == STEPS
