"""The agent starts before its command is known, runs the command that it is sent, and ends if none is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ahead import OPTION, AgentAhead, agent_ahead, read_arguments
from tests.commands import quiet_environment, run_command
from train.faults.stop import PREEMPTED_CODE


def test_arguments_come_from_the_command_line_or_with_their_environment_from_a_pipe(monkeypatch: pytest.MonkeyPatch):
    assert read_arguments(["--num_processes", "2"]) == ["--num_processes", "2"]
    monkeypatch.setattr(os, "environ", {"KEPT": "no"})
    read, write = os.pipe()
    os.write(write, json.dumps({"arguments": ["-m", "train", "é"], "environment": {"A": "1"}}).encode())
    os.close(write)
    assert read_arguments([OPTION, str(read)]) == ["-m", "train", "é"]
    assert os.environ == {"A": "1"}


def test_an_agent_without_a_command_ends():
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(SystemExit) as ended:
        read_arguments([OPTION, str(read)])
    assert ended.value.code == 0

    with agent_ahead(quiet_environment({})) as agent:
        assert agent.process.poll() is None
    assert agent.process.returncode is not None


def test_an_agent_runs_the_command_that_it_is_handed(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(os.environ['SAID'] + sys.argv[1])\n"
    )
    agent = AgentAhead(quiet_environment({}))
    options = ["--config_file", "launch/accelerate/cpu.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", "launch.agent", *options, str(script), "hello"]
    process = agent.start(command, quiet_environment({"SAID": "it says "}))
    assert process.wait(timeout=240) == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["it says hello"] * 2
    agent.dismiss()


def test_a_mistake_in_the_configuration_leaves_no_agent(tmp_path: Path):
    """A surviving agent would keep the output open, and a reader of it would wait forever."""
    done = run_command(["launch", "experiment=demo", "sparsity.target=1.2", f"runs_dir={tmp_path}"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: sparsity.target=1.2 is outside [0, 1)")


def test_a_signal_while_a_package_imports_ends_the_process_even_if_the_package_catches_everything(tmp_path: Path):
    (tmp_path / "greedy.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    pass\n"
    )
    script = "from train.faults.preempt import end_when_asked; end_when_asked(); import greedy; print('went on')"
    environment = {**quiet_environment({}), "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (PREEMPTED_CODE, "", "")
