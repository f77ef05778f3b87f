"""--help of the commands that take only key=value, and their error for an unknown option."""

import pytest

from conf.cli import overrides_of


def test_help_says_what_the_command_does_with_its_examples_and_ends(capsys):
    with pytest.raises(SystemExit) as ended:
        overrides_of("eval.report", "Show runs.", "python -m eval.report runs=a\n    ... page=b", ["-h"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith("usage: python -m eval.report key=value ...")
    assert "Show runs." in said
    assert "python -m eval.report runs=a\n    ... page=b" in said


def test_overrides_come_back_as_they_were_typed():
    typed = ["runs=[a,b]", "+x=-1", "~y", "title=two words"]
    assert overrides_of("eval.report", "", "", typed) == typed


def test_an_unknown_option_is_an_error_of_one_sentence():
    with pytest.raises(
        ValueError, match=r"^--page is not an option of python -m eval.report: give key=value, or --help\.$"
    ):
        overrides_of("eval.report", "", "", ["--page", "runs=a"])
