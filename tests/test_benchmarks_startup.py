"""The timing of a command until its first step."""

from __future__ import annotations

import os
import sys

import pytest

from tests.benchmarks import startup


def test_a_command_is_timed_until_its_sign_and_runs_on(tmp_path):
    sign, end = tmp_path / "sign", tmp_path / "end"
    sign.write_text("of a run before")
    code = (
        f"import pathlib, time; time.sleep(0.2); p = pathlib.Path; p({str(sign)!r}).write_text('x'); time.sleep(0.5); "
    )
    taken, processor = startup.seconds_until(
        [sys.executable, "-c", f"{code} p({str(end)!r}).touch()"], sign, dict(os.environ)
    )
    assert taken > 0.2
    assert processor > 0
    assert end.exists()


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no such luck"):
        startup.seconds_until([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "sign", {})


def test_a_command_that_says_a_lot_before_its_first_step_is_not_held_up(tmp_path):
    sign = tmp_path / "sign"
    code = f"import pathlib; print('x' * 300_000, flush=True); pathlib.Path({str(sign)!r}).write_text('x')"
    assert startup.seconds_until([sys.executable, "-c", code], sign, dict(os.environ))[0] > 0


def test_a_command_that_ends_with_its_first_step_has_made_it(tmp_path):
    sign = tmp_path / "sign"
    for _ in range(10):
        assert startup.seconds_until(["sh", "-c", f"echo x > '{sign}'"], sign, dict(os.environ))[0] > 0
    with pytest.raises(RuntimeError, match="failed:\nno step"):
        startup.seconds_until(["sh", "-c", "echo no step"], sign, dict(os.environ))
